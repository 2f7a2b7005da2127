from collections import Counter
from fractions import Fraction
from types import MappingProxyType

import numpy as np
import pytest
from data.array_shard import ArrayShard

from hymba_jax.data.examples import Examples, Read
from hymba_jax.data.mixture import Mixture
from hymba_jax.data.token_store import TokenStore
from hymba_jax.data.windows import Windows

SIZES = {"a": 7, "b": 20}
FIRST = {"a": 1000, "b": 2000}  # the first token of each source


def make(seed=0, weights=(1.0, 2.0), read=MappingProxyType({})):
    rows = {
        name: Windows(
            TokenStore(
                [
                    ArrayShard(
                        name, np.arange(FIRST[name], FIRST[name] + 4 * size + 1, dtype=np.uint16)
                    )
                ]
            ),
            4,
        )
        for name, size in SIZES.items()
    }
    return Examples(rows, Mixture(dict(zip("ab", weights, strict=True))), seed, read=read)


def read(example):
    """The source and the row that the tokens of an example are from."""
    first = int(example.inputs[0])
    name = "b" if first >= 2000 else "a"
    return name, (first - FIRST[name]) // 4


def test_shares_and_epochs_are_exact():
    examples = make()
    found = [read(examples[index]) for index in range(300)]
    for count in range(300):
        share = Fraction(count, 3)
        assert abs(sum(name == "a" for name, _ in found[:count]) - share) < 1
    for name, size in SIZES.items():
        order = [row for other, row in found if other == name]
        epochs = [tuple(order[start : start + size]) for start in range(0, len(order) - size, size)]
        assert len(set(epochs)) == len(epochs) >= 9
        assert all(sorted(epoch) == list(range(size)) for epoch in epochs)


def test_an_example_is_what_its_origin_says():
    examples = make(seed=3)
    seen = Counter()
    for index in range(100):
        origin = examples.origin(index)
        assert read(examples[index]) == (origin.source, origin.row)
        assert origin.epoch == seen[origin.source] // SIZES[origin.source]
        seen[origin.source] += 1


def test_order_depends_on_the_seed_alone():
    orders = [[read(make(seed)[index]) for index in range(50)] for seed in (1, 1, 2)]
    assert orders[0] == orders[1] != orders[2]


def test_progress_counts_sequences_and_epochs():
    counts = Counter(make().origin(index).source for index in range(100))
    assert make().progress(100) == {
        "sequences/a": counts["a"],
        "sequences/b": counts["b"],
        "epoch/a": pytest.approx(counts["a"] / 7, abs=1e-4),
        "epoch/b": pytest.approx(counts["b"] / 20, abs=1e-4),
    }
    assert make(weights=(1.0, 0.0)).progress(100) == {"epoch": pytest.approx(100 / 7, abs=1e-4)}


def test_progress_goes_on_from_stages_with_other_rows_and_sources():
    """There `c` had 8 rows, and `a` half as many as here."""
    before = {"c": Read(12, Fraction(12, 8)), "a": Read(7, Fraction(2))}
    counts = Counter(make().origin(index).source for index in range(100))
    assert make(read=before).progress(100) == {
        "sequences/c": 12,
        "sequences/a": 7 + counts["a"],
        "sequences/b": counts["b"],
        "epoch/c": 1.5,
        "epoch/a": pytest.approx(2 + counts["a"] / 7, abs=1e-4),
        "epoch/b": pytest.approx(counts["b"] / 20, abs=1e-4),
    }


def test_examples_are_named_by_source_and_row():
    examples = make()
    rows = [examples.origin(index) for index in range(4, 12)]
    named = ", ".join(f"{origin.source} {origin.row}" for origin in rows)
    assert examples.describe(4, 12) == f"sequences 4 to 11 (rows {named})"
    assert examples.describe(4, 20) == f"sequences 4 to 19 (rows {named} and 8 more)"
