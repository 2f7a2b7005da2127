import numpy as np
import pytest
from data.array_shard import ArrayShard

from hymba_jax.data import IGNORED_TARGET
from hymba_jax.data.token_store import TokenStore
from hymba_jax.data.windows import Windows


def store(tokens):
    return TokenStore([ArrayShard("numbers", np.asarray(tokens, np.uint16))])


@pytest.mark.parametrize("keep_last", [False, True])
def test_windows_predict_each_token_once(keep_last):
    windows = Windows(store(range(100, 144)), 10, keep_last=keep_last)
    rows = [windows[index] for index in range(len(windows))]
    inputs = np.concatenate([row.inputs for row in rows])
    targets = np.concatenate([row.targets for row in rows])
    predicted = targets != IGNORED_TARGET
    last = 143 if keep_last else 140
    assert inputs[predicted].tolist() == [*range(100, last)]
    assert targets[predicted].tolist() == [*range(101, last + 1)]
    assert windows.num_targets == predicted.sum()
    assert len(rows) == 4 + keep_last
    assert inputs.dtype == targets.dtype == np.int32


def test_a_window_needs_one_token_more_than_its_length():
    for count, expected in ((10, 0), (11, 1), (20, 1), (21, 2)):
        assert len(Windows(store(range(count)), 10)) == expected
