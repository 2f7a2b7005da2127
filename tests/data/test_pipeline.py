import threading
from itertools import islice

import numpy as np
import pytest
from data.array_shard import ArrayShard
from inference.models import byte_tokenizer

from hymba_jax.config.data import DataConfig
from hymba_jax.data import IGNORED_TARGET, Data, train_batches, validation_batches
from hymba_jax.data.examples import Examples
from hymba_jax.data.mixture import Mixture
from hymba_jax.data.pipeline import ValidationSet, make_rows
from hymba_jax.data.sources import Tokens
from hymba_jax.data.token_store import TokenStore
from hymba_jax.data.windows import Windows
from hymba_jax.errors import HymbaError

TOKENS = np.arange(1000, 1000 + 37 * 8 + 5, dtype=np.uint16)  # 37 windows of 8, and 4 targets over
STORE = TokenStore([ArrayShard("numbers", TOKENS)])
WINDOWS = Windows(STORE, 8)
VALIDATION = Windows(STORE, 8, keep_last=True)


def iterator(batch_size, seed, windows=WINDOWS, rows=None, start=0):
    examples = Examples({"a": windows}, Mixture({"a": 1.0}), seed)
    return train_batches(examples, batch_size, start, rows)


def starts(batch):
    """Windows of TOKENS in a batch, by index."""
    index, rest = np.divmod(batch.inputs[:, 0] - 1000, 8)
    assert not rest.any()
    return index.tolist()


def test_batches_are_windows_of_the_stream():
    for batch in islice(iterator(5, seed=0), 20):
        assert batch.inputs.shape == batch.targets.shape == (5, 8)
        assert batch.inputs.dtype == batch.targets.dtype == np.int32
        for row, index in enumerate(starts(batch)):
            window = TOKENS[index * 8 : index * 8 + 9]
            np.testing.assert_array_equal(batch.inputs[row], window[:-1])
            np.testing.assert_array_equal(batch.targets[row], window[1:])


def test_every_window_comes_once_an_epoch_in_a_new_order():
    batches = islice(iterator(5, seed=3), 3 * 37)
    order = [index for batch in batches for index in starts(batch)]
    epochs = [order[start : start + 37] for start in range(0, len(order), 37)]
    assert len(epochs) == 15
    for epoch in epochs:
        assert sorted(epoch) == list(range(37))
        assert epoch != sorted(epoch)
    assert len(set(map(tuple, epochs))) == 15


def test_order_depends_on_the_seed_alone():
    def order(seed):
        return [starts(batch) for batch in islice(iterator(5, seed), 8)]

    assert order(1) == order(1)
    assert order(1) != order(2)


@pytest.mark.parametrize("step", [0, 1, 7, 8, 23])
def test_resume_is_exact(step):
    through = islice(iterator(5, seed=4), step, step + 12)
    for wanted, batch in zip(through, iterator(5, seed=4, start=step), strict=False):
        np.testing.assert_array_equal(batch.inputs, wanted.inputs)
        np.testing.assert_array_equal(batch.targets, wanted.targets)


def test_order_of_windows_does_not_depend_on_the_batch_size():
    small = [i for b in islice(iterator(2, seed=5), 12) for i in starts(b)]
    large = [i for b in islice(iterator(6, seed=5), 4) for i in starts(b)]
    assert small == large


def test_batch_larger_than_the_stream_wraps_around():
    batch = next(iterator(3, 0, Windows(TokenStore([ArrayShard("nine", TOKENS[:9])]), 8)))
    assert starts(batch) == [0, 0, 0]


def test_no_threads_are_left():
    before = threading.active_count()
    next(iterator(5, seed=0))
    assert threading.active_count() == before


@pytest.mark.parametrize("batch_size", [1, 4, 19, 50])
def test_validation_covers_every_target_once(batch_size):
    batches = list(validation_batches(VALIDATION, batch_size))
    assert len(batches) == -(-38 // batch_size)
    assert all(batch.targets.shape == (batch_size, 8) for batch in batches)
    inputs = np.concatenate([batch.inputs.ravel() for batch in batches])
    targets = np.concatenate([batch.targets.ravel() for batch in batches])
    counted = targets != IGNORED_TARGET
    assert targets[counted].tolist() == TOKENS[1:].tolist()
    assert inputs[counted].tolist() == TOKENS[:-1].tolist()
    assert not inputs[~counted].any()


@pytest.mark.parametrize("batch_size", [1, 2, 3, 8, 20])
def test_validation_limit_spreads_evenly_whatever_the_batch_size(batch_size):
    batches = list(validation_batches(VALIDATION, batch_size, limit=8))
    targets = np.concatenate([batch.targets for batch in batches])
    targets = targets[(targets != IGNORED_TARGET).any(axis=1)]
    assert ((targets[:, 0] - 1001) // 8).tolist() == [0, 4, 9, 14, 19, 23, 28, 33]
    again = validation_batches(VALIDATION, batch_size, limit=8)
    for batch, same in zip(batches, again, strict=True):
        np.testing.assert_array_equal(batch.targets, same.targets)


def test_validation_limit_beyond_the_stream_changes_nothing():
    for batch, same in zip(
        validation_batches(VALIDATION, 4), validation_batches(VALIDATION, 4, limit=40), strict=True
    ):
        np.testing.assert_array_equal(batch.targets, same.targets)


def test_a_process_reads_its_own_rows():
    whole, own = iterator(6, seed=1), iterator(6, seed=1, rows=[1, 4])
    for _ in range(10):
        assert np.array_equal(next(own).inputs, next(whole).inputs[[1, 4]])
    for batch, part in zip(
        validation_batches(VALIDATION, 6),
        validation_batches(VALIDATION, 6, None, [0, 5]),
        strict=True,
    ):
        assert np.array_equal(part.targets, batch.targets[[0, 5]])


def test_validation_that_predicts_no_token_is_refused():
    documents = TokenStore([ArrayShard("endings", np.full(5, 2, np.uint16), eos_id=2)])
    data = Data(byte_tokenizer(), {}, {"held": Tokens(documents, "digest", text_bytes=5)})
    assert data.validation_sets(DataConfig())["held"].loss_weight == 4
    with pytest.raises(HymbaError, match="validation source held: no token is predicted, as its"):
        data.validation_sets(DataConfig(validation_packing="documents"))


@pytest.mark.parametrize("packing", ["concat", "documents"])
def test_bits_per_byte_of_a_uniform_guess(packing):
    """Of all that is predicted: every token but the first, of the stream or of each document."""
    lengths = [5, 40, 3, 17, 9]
    tokens = np.concatenate([[1, *range(3, length + 1), 2] for length in lengths])
    assert len(tokens) == sum(lengths)
    store = TokenStore([ArrayShard("documents", tokens.astype(np.uint16), eos_id=2)])
    rows = make_rows(store, packing, 8, keep_last=True)
    batches = list(validation_batches(rows, 3))
    count = sum((batch.targets != IGNORED_TARGET).sum() for batch in batches)
    assert count == rows.num_targets == len(tokens) - (1 if packing == "concat" else 5)
    bits = ValidationSet(rows, text_bytes=100).bits_per_byte(np.log(259))
    assert bits == pytest.approx(count * np.log2(259) / 100, rel=1e-12)
