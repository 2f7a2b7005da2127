import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hymba_jax.data.mixture import Mixture, _block, _counts
from hymba_jax.data.permutation import Permutation, shuffled_row
from hymba_jax.errors import HymbaError


def assert_shares_hold(mixture, examples):
    """Counts of every prefix, by brute force; positions are the numbers of those before."""
    counts = dict.fromkeys(mixture.shares, 0)
    for i in range(examples):
        assert mixture.counts(i) == counts
        for name, share in mixture.shares.items():
            assert abs(counts[name] - i * share) < 1, (i, name)
        name, position = mixture(i)
        assert position == counts[name]
        counts[name] += 1


@given(st.lists(st.integers(1, 40), min_size=1, max_size=9))
@example([1, 1, 1])
@example([1] * 8 + [40])
@settings(deadline=None, max_examples=15, database=None, derandomize=True)
def test_shares_hold_at_every_moment(numbers):
    mixture = Mixture({str(name): number / 40 for name, number in enumerate(numbers)})
    assert list(mixture.shares.values()) == [Fraction(n, sum(numbers)) for n in numbers]
    assert_shares_hold(mixture, 2 * sum(numbers) + 1)


@pytest.mark.parametrize(
    "weights",
    [
        {"a": 0.70001, "b": 0.29999},
        {str(name): math.sqrt(name + 1) for name in range(12)},
        {"large": 1.0, "small": 1e-9, "third": 1 / 3},
    ],
    ids=["two", "twelve", "small"],
)
def test_shares_hold_whatever_the_weights(weights, monkeypatch):
    """Across the borders of blocks, which are small here, also far from the first one."""
    monkeypatch.setattr("hymba_jax.data.mixture.BLOCK", 8)
    _block.cache_clear()
    _counts.cache_clear()
    mixture = Mixture(weights)
    total = sum(map(Fraction, map(repr, weights.values())))
    assert mixture.shares == {name: Fraction(repr(w)) / total for name, w in weights.items()}
    for start in (0, 200_000, 10**9 + 7):
        counts = mixture.counts(start)
        for i in range(start, start + 200):
            assert sum(counts.values()) == i
            assert all(abs(counts[name] - i * share) < 1 for name, share in mixture.shares.items())
            name, position = mixture(i)
            assert position == counts[name]
            counts[name] += 1
        assert mixture.counts(start + 200) == counts
    _block.cache_clear()
    _counts.cache_clear()


def test_weights_are_taken_as_they_are_written():
    mixture = Mixture({"web": 0.7, "code": 0.2, "none": 0.0, "mathematics": 0.1})
    assert mixture.shares == {
        "web": Fraction(7, 10),
        "code": Fraction(2, 10),
        "mathematics": Fraction(1, 10),
    }
    assert mixture.unused == ["none"]
    assert mixture.counts(100) == {"web": 70, "code": 20, "mathematics": 10}
    far = 10**15 + 3
    name, position = mixture(far)
    assert position == mixture.counts(far)[name]
    assert sum(mixture.counts(far).values()) == far


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"a": 1.0, "b": -0.5}, "the weight of 'b' is -0.5"),
        ({"a": math.nan}, "the weight of 'a' is nan"),
        ({"a": math.inf, "b": 1.0}, "the weight of 'a' is inf"),
        ({"a": 0.0, "b": 0}, "no source has a weight above 0"),
        ({}, "no source has a weight above 0"),
    ],
)
def test_bad_weights(weights, message):
    with pytest.raises(HymbaError, match=message):
        Mixture(weights)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100, 1025, 2000])
def test_permutations_are_permutations(size):
    orders = []
    for seed in range(3):
        permutation = Permutation(size, seed, "source", 0)
        orders.append([permutation(index) for index in range(size)])
        assert sorted(orders[-1]) == list(range(size))
    if size >= 100:
        # Neighbours, and the same index under other keys, go to unrelated places: correlations of
        # random numbers deviate by size**-0.5.
        pairs = [(order[:-1], order[1:]) for order in orders]
        pairs += [(orders[0], orders[1]), (orders[1], orders[2]), (orders[0], range(size))]
        for one, other in pairs:
            assert abs(np.corrcoef(one, other)[0, 1]) < 5 * size**-0.5


def test_orders_of_large_sources_stay_what_they_are():
    """Runs that are resumed count on it: these numbers were computed by this implementation."""
    permutation = Permutation(10**12, 0, "web", 3)
    assert [permutation(index) for index in (0, 1, 10**12 - 1)] == [
        803959455945,
        660568084436,
        26192484110,
    ]
    wide = Permutation(2**62, 1)
    assert len({wide(index) for index in range(1000)}) == 1000
    assert 0 <= wide(2**62 - 1) < 2**62


def test_every_row_comes_once_an_epoch_in_another_order():
    rows = [shuffled_row(position, 11, 5, "web") for position in range(33)]
    assert [epoch for epoch, _ in rows] == [0] * 11 + [1] * 11 + [2] * 11
    orders = [tuple(row for _, row in rows[start : start + 11]) for start in (0, 11, 22)]
    orders.append(tuple(shuffled_row(position, 11, 5, "code")[1] for position in range(11)))
    orders.append(tuple(shuffled_row(position, 11, 6, "web")[1] for position in range(11)))
    assert all(sorted(order) == list(range(11)) for order in orders)
    assert len(set(orders)) == 5
