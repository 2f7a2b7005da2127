"""Whole conversations in rows: none is split, and the loss is on answers alone."""

import numpy as np
import pytest
from data.array_shard import ArrayShard
from hypothesis import given, settings
from hypothesis import strategies as st

from hymba_jax.data import conversation_rows
from hymba_jax.data.batch import IGNORED_TARGET
from hymba_jax.data.conversation_rows import ConversationRows, pack_whole
from hymba_jax.data.token_store import TokenStore

END = 2


class MaskedShard(ArrayShard):
    has_mask = True

    def __init__(self, tokens, mask):
        super().__init__("conversations", tokens, eos_id=END)
        self._mask = mask

    def read_mask(self, start, stop):
        return self._mask[start:stop]


def make_conversations(count, seed=0):
    """Tokens and masks; each begins with its number, and its answers may be anywhere."""
    rng = np.random.default_rng(seed)
    conversations = []
    for number in range(count):
        length = int(rng.integers(3, 40))
        tokens = np.append(rng.integers(3, 90, length - 1), END)
        tokens[0] = 100 + number
        mask = rng.random(length) < 0.05
        mask[rng.integers(1, length)] = True
        conversations.append((tokens.astype(np.uint16), mask))
    return conversations


def make_store(conversations):
    """Two shards."""
    half = len(conversations) // 2
    shards = []
    for part in (conversations[:half], conversations[half:]):
        tokens, masks = zip(*part, strict=True)
        shards.append(MaskedShard(np.concatenate(tokens), np.concatenate(masks)))
    return TokenStore(shards)


def segments(rows):
    """By the number of each conversation: its inputs and targets in its row."""
    found = {}
    for index in range(len(rows)):
        inputs, targets, segment_ids, *_ = rows[index]
        assert inputs.dtype == targets.dtype == segment_ids.dtype == np.int32
        used = segment_ids > 0
        assert (np.diff(segment_ids[used]) >= 0).all()
        assert not inputs[~used].any()
        assert (targets[~used] == IGNORED_TARGET).all()
        assert used.sum() == np.argmin(np.append(used, False))  # padding is behind
        for segment in range(1, segment_ids.max() + 1):
            own = segment_ids == segment
            number = int(inputs[own][0]) - 100
            assert number not in found
            found[number] = inputs[own], targets[own]
    return found


@pytest.mark.parametrize("too_long", ["truncate", "drop"])
@pytest.mark.parametrize("length", [64, 39, 12])
def test_a_conversation_is_in_one_row_and_its_answers_are_targets(monkeypatch, length, too_long):
    monkeypatch.setattr(conversation_rows, "GROUP", 7)
    conversations = make_conversations(40)
    rows = ConversationRows(make_store(conversations), length, too_long)
    found = segments(rows)
    num_targets, num_truncated = 0, 0
    for number, (tokens, mask) in enumerate(conversations):
        is_too_long = len(tokens) > length + 1
        kept = mask[1 : length + 1]
        if not kept.any() or (is_too_long and too_long == "drop"):
            assert number not in found
            continue
        inputs, targets = found.pop(number)
        expected = np.where(kept, tokens[1 : length + 1].astype(int), IGNORED_TARGET)
        assert targets.tolist() == expected.tolist()
        assert inputs.tolist() == tokens[:-1][:length].tolist()
        num_targets += int(kept.sum())
        num_truncated += is_too_long
    assert not found
    assert rows.num_targets == num_targets
    assert rows.num_truncated == num_truncated
    empty = sum((rows[index].segment_ids == 0).sum() for index in range(len(rows)))
    assert rows.padding == pytest.approx(empty / (len(rows) * length))
    left_out = rows.describe_left_out()
    if length >= 39:
        assert (rows.num_dropped, left_out) == (0, None)
    else:
        assert rows.num_dropped > 0
        assert f"{rows.num_dropped} dropped, as they do not fit rows of 12 tokens" in left_out
        assert (f"of 40 conversations {num_truncated} truncated and" in left_out) == (
            too_long == "truncate"
        )


def test_rows_depend_on_their_index_alone():
    conversations = make_conversations(30)
    rows, again = (ConversationRows(make_store(conversations), 50) for _ in range(2))
    assert len(rows) > 5
    for index in (len(rows) - 1, 0, 3):
        for field, expected in zip(again[index], rows[index], strict=True):
            np.testing.assert_array_equal(field, expected)
    with pytest.raises(IndexError):
        rows[len(rows)]


def test_none_may_be_left():
    rows = ConversationRows(make_store(make_conversations(5)), 1, "drop")
    assert len(rows) == rows.num_targets == 0


@given(st.lists(st.integers(1, 40), min_size=1, max_size=60))
@settings(deadline=None, max_examples=60, database=None, derandomize=True)
def test_items_are_packed_whole_into_few_rows(sizes):
    rows = pack_whole(sizes, 40)
    assert sorted(item for row in rows for item in row) == list(range(len(sizes)))
    filled = sorted(sum(sizes[item] for item in row) for row in rows)
    assert filled[-1] <= 40
    # Else the first item of one would have been put into the other.
    assert len(filled) == 1 or filled[0] + filled[1] > 40
