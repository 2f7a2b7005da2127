"""Pairs of conversations in rows: both sides in one, and whatever does not fit counted."""

import numpy as np
import pytest
from data.test_conversation_rows import END, make_conversations, make_store

from hymba_jax.data import conversation_rows
from hymba_jax.data.batch import IGNORED_TARGET
from hymba_jax.data.preference_rows import PreferenceRows

PAIRS = 20


def make_pairs(seed=0):
    """Tokens and masks of pairs; every document begins with its number."""
    return make_conversations(2 * PAIRS, seed)


def expected_sizes(sizes, length):
    """Targets of the sides of a pair that are left, by the rule: the longer one is cut first."""
    sizes = list(sizes)
    while sum(sizes) > length:
        longest = max(sizes)
        # Of two as long as each other both are cut: one side may not be favored.
        sizes = [size - (size == longest) for size in sizes]
    return sizes


@pytest.mark.parametrize("too_long", ["truncate", "drop"])
@pytest.mark.parametrize("length", [90, 41, 24])
def test_a_pair_is_in_one_row_and_its_answers_are_targets(monkeypatch, length, too_long):
    monkeypatch.setattr(conversation_rows, "GROUP", 7)
    documents = make_pairs()
    rows = PreferenceRows(make_store(documents), length, too_long)
    rows.reference = np.arange(2.0 * rows.num_pairs, dtype=np.float32).reshape(-1, 2)
    found, pairs = {}, []
    for index in range(len(rows)):
        row = rows[index]
        pairs += rows.pairs(index)
        for segment in range(1, row.segment_ids.max() + 1):
            own = row.segment_ids == segment
            number = int(row.inputs[own][0]) - 100
            assert number % 2 == 1 - segment % 2  # chosen is even, of segment 1, 3, ...
            found[number] = row.inputs[own].tolist(), row.targets[own].tolist()
            reference = row.reference_log_probs[own]
            pair = rows.pairs(index)[(segment - 1) // 2]
            assert reference[0] == rows.reference[pair, 1 - segment % 2]
            assert not reference[1:].any()
        assert not row.reference_log_probs[row.segment_ids == 0].any()
    assert sorted(pairs) == [*range(rows.num_pairs)]
    truncated = dropped = 0
    for pair in range(PAIRS):
        sides = documents[2 * pair : 2 * pair + 2]
        sizes = [len(tokens) - 1 for tokens, _ in sides]
        kept = expected_sizes(sizes, length)
        has_answers = all(
            mask[1 : size + 1].any() for (_, mask), size in zip(sides, kept, strict=True)
        )
        if not has_answers or (kept != sizes and too_long == "drop"):
            assert not {2 * pair, 2 * pair + 1} & found.keys()
            dropped += 1
            continue
        truncated += kept != sizes
        for number, (tokens, mask), size in zip((2 * pair, 2 * pair + 1), sides, kept, strict=True):
            inputs, targets = found[number]
            assert inputs == tokens[:size].tolist()
            wanted = np.where(mask[1:], tokens[1:].astype(int), IGNORED_TARGET)[:size]
            assert targets == wanted.tolist()
    assert (rows.num_truncated, rows.num_dropped) == (truncated, dropped)
    assert rows.num_pairs + dropped == PAIRS
    if length == 24:
        assert dropped > 0
        assert (
            f"of 20 pairs {truncated} truncated and {dropped} dropped, as they do not fit"
            in (rows.describe_left_out())
            or too_long == "drop"
        )


def test_sides_that_are_alike_once_they_are_truncated_are_dropped():
    tokens, mask = np.array([7, 8, 9, 10, 11, END], np.uint16), np.ones(6, bool)
    other = tokens.copy()
    other[4] = 12
    store = make_store([(tokens, mask), (other, mask)])
    assert len(PreferenceRows(store, 10)) == 1
    assert (len(PreferenceRows(store, 8)), len(PreferenceRows(store, 7))) == (1, 0)
