from collections import Counter

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hymba_jax.data.batch import IGNORED_TARGET, abstract_batch, stack_rows
from hymba_jax.data.document_rows import ROWS_PER_BLOCK, DocumentRows, pack_fragments
from hymba_jax.data.megatron import MegatronWriter
from hymba_jax.data.token_store import open_tokens


@pytest.fixture
def make_store(tmp_path):
    """Two shards of documents of these lengths, whose tokens are 1, 2, 3, ..."""

    def make(lengths):
        stops = np.cumsum(lengths)
        for shard, part in enumerate(np.array_split(np.arange(len(lengths)), 2)):
            with MegatronWriter(tmp_path / str(shard), 1 << 20) as writer:
                for document in part.tolist():
                    stop = int(stops[document])
                    writer.write([np.arange(stop - lengths[document], stop) + 1])
        return open_tokens([tmp_path / "0", tmp_path / "1"])

    return make


@pytest.mark.parametrize(
    ("length", "mean", "count"), [(8, 4, 220), (8, 30, 40), (64, 20, 300), (50, 1, 90), (8, 3, 2)]
)
def test_every_token_but_the_first_of_a_document_is_a_target_once(make_store, length, mean, count):
    rng = np.random.default_rng(length * mean)
    lengths = 1 + rng.poisson(rng.exponential(mean, count))
    starts = np.cumsum(lengths) - lengths
    firsts = {int(start) + 1 for start in starts}
    document = np.repeat(np.arange(count), lengths)
    store = make_store(lengths)
    rows = DocumentRows(store, length)
    found: Counter[int] = Counter()
    padding = []
    for i in range(len(rows)):
        inputs, targets, segment_ids, *_ = rows[i]
        is_padding = targets == IGNORED_TARGET
        assert inputs.dtype == targets.dtype == segment_ids.dtype == np.int32
        assert inputs.shape == targets.shape == segment_ids.shape == (length,)
        assert (is_padding == (segment_ids == 0)).all()
        padding.append(is_padding.mean())
        assert not inputs[is_padding].any()
        valid = length - is_padding.sum()
        assert not is_padding[:valid].any()
        # A segment is consecutive tokens of one document, each predicted by the one before it.
        assert (inputs[:valid] + 1 == targets[:valid]).all()
        if valid:
            assert segment_ids[0] == 1
        for j in range(1, valid):
            if segment_ids[j] == segment_ids[j - 1]:
                assert inputs[j] == targets[j - 1]
            else:
                assert segment_ids[j] == segment_ids[j - 1] + 1
        assert (document[inputs[:valid] - 1] == document[targets[:valid] - 1]).all()
        found.update(targets[:valid].tolist())
    assert set(found.values()) <= {1}
    assert set(found) == set(range(1, lengths.sum() + 1)) - firsts
    assert rows.padding == pytest.approx(np.mean(padding))
    store.num_documents = None
    assert rows.padding == pytest.approx(np.mean(padding[:ROWS_PER_BLOCK]))
    with pytest.raises(IndexError):
        rows[len(rows)]


def test_empty_documents_are_no_targets_less(make_store):
    rows = DocumentRows(make_store([3, 0, 2, 0, 0, 4]), 8)
    assert rows.num_targets == sum((row.targets != IGNORED_TARGET).sum() for row in rows) == 6


def test_rows_depend_on_their_index_alone(make_store):
    lengths = [1 + n % 23 for n in range(300)]
    rows = DocumentRows(make_store(lengths), 16)
    assert len(rows) > 2 * ROWS_PER_BLOCK
    through = [rows[i] for i in range(len(rows))]
    for i in (len(rows) - 1, 0, ROWS_PER_BLOCK, ROWS_PER_BLOCK - 1, 5):
        again = DocumentRows(make_store(lengths), 16)[i]
        for field, expected in zip(again, through[i], strict=True):
            np.testing.assert_array_equal(field, expected)


def test_batches_are_what_their_abstract_one_says(make_store):
    rows = DocumentRows(make_store([5, 9, 30]), 16)
    batch, abstract = stack_rows([rows[0], rows[1]]), abstract_batch(2, 16, segment_ids=True)
    assert jax.tree.structure(batch) == jax.tree.structure(abstract)
    for array, like in zip(jax.tree.leaves(batch), jax.tree.leaves(abstract), strict=True):
        assert (array.shape, array.dtype) == (like.shape, like.dtype)


def test_at_realistic_lengths_little_is_padding_and_few_are_split(make_store):
    """Log-normal, 500 tokens on average: of the padding, 1 in 256 is slack and 1 in 500 is the
    first token of a document, which no target is."""
    rng = np.random.default_rng(0)
    lengths = np.maximum(1, rng.lognormal(np.log(500) - 0.5, 1.0, 600)).astype(int)
    rows = DocumentRows(make_store(lengths), 2048)
    whole = len(rows) // ROWS_PER_BLOCK * ROWS_PER_BLOCK
    batches = [rows[i] for i in range(whole)]
    padding = np.mean([batch.segment_ids == 0 for batch in batches])
    assert padding < 1 / 256 + 1 / 500 + 0.001
    pieces = sum(int(batch.segment_ids.max()) for batch in batches)
    starts = np.cumsum(lengths) - lengths
    positions = ROWS_PER_BLOCK * 2048 - ROWS_PER_BLOCK * 2048 // 256
    in_blocks = starts < whole // ROWS_PER_BLOCK * positions
    needed = np.sum(-(-(lengths[in_blocks] - 1) // 2048))
    assert pieces <= needed + 2 * (whole // ROWS_PER_BLOCK)  # and those at borders of blocks


@given(st.lists(st.integers(1, 40), min_size=1, max_size=30), st.integers(1, 20))
@settings(deadline=None, max_examples=60, database=None, derandomize=True)
def test_fragments_always_fit(sizes, length):
    num_rows = -(-sum(sizes) // length)  # no room to spare
    rows = pack_fragments(np.array(sizes), num_rows, length)
    assert all(sum(size for _, _, size in row) <= length for row in rows)
    pieces = [piece for row in rows for piece in row]
    placed = sorted((fragment, offset + i) for fragment, offset, n in pieces for i in range(n))
    assert placed == [(fragment, i) for fragment, size in enumerate(sizes) for i in range(size)]


def test_the_tightest_row_is_chosen_and_only_what_fits_nowhere_is_split():
    rows = pack_fragments(np.array([6, 3, 5, 4, 2]), 2, 10)
    assert sorted(sorted(piece[0] for piece in row) for row in rows) == [[0, 3], [1, 2, 4]]
    rows = pack_fragments(np.array([7, 7, 6]), 2, 10)
    split = [piece[1:] for row in rows for piece in row if piece[0] == 2]
    assert sorted(split) == [(0, 3), (3, 3)]
    rows = pack_fragments(np.array([8, 7, 6, 5, 4]), 3, 10)
    split = [piece for row in rows for piece in row if piece[0] >= 3]
    assert sorted(split) == [(3, 0, 3), (3, 3, 2), (4, 0, 4)]  # 5 waits until 4 is placed
