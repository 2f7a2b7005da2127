"""Rows of whole conversations, of which only the answers are targets.

Conversations are never split. They are packed by best fit, the longest first, in groups of as many
as follow one another, so that rows depend on the tokens and the length alone. Each is computed as
if it were alone.

A conversation that is longer than a row is dropped, or truncated behind the last position of a row;
one with no answer left is dropped then, too. `preference_rows.py` does the same with pairs.
"""

from bisect import bisect_left, insort
from collections.abc import Iterator
from itertools import batched

import numpy as np

from hymba_jax.config.data import TooLong
from hymba_jax.data.batch import IGNORED_TARGET, Batch
from hymba_jax.data.token_store import TokenStore
from hymba_jax.types import Bool, Int

GROUP = 4096
"""Conversations, or pairs of them, that are packed together."""


class ConversationRows:
    """The rows that a source's conversations are packed into, a data source for Grain.

    Record i is row i of a batch. Its conversations have the segment ids 1, 2, ... and behind them
    is padding, of segment 0. Opening takes time in proportion to the conversations.

    Args:
      tokens: a source with masks.
      length: positions of a row.
      too_long: what is done about conversations of more than `length + 1` tokens.

    Attributes:
      num_targets: tokens that are predicted, in all rows.
      num_items: conversations of the source.
      num_truncated: those that are in rows, but not to their end.
      num_dropped: those that are in no row.
    """

    item = "conversations"
    """What is packed, and kept or left out, as a whole."""

    _sides = 1
    """Documents that follow one another of each."""

    def __init__(self, tokens: TokenStore, length: int, too_long: TooLong = "truncate") -> None:
        self._tokens, self.length = tokens, length
        starts = tokens.document_starts(0, tokens.num_tokens)
        sizes = np.diff(starts, append=tokens.num_tokens) - 1  # targets: all tokens but the first
        starts, sizes = (each.reshape(-1, self._sides) for each in (starts, sizes))
        kept = self._fitting(sizes)
        targets = self._count_targets(starts.ravel(), kept.ravel()).reshape(kept.shape)
        is_too_long = (kept < sizes).any(1)
        is_used = targets.all(1) & ~self._are_alike(starts, kept)
        if too_long == "drop":
            is_used &= ~is_too_long
        self._starts, self._sizes = starts[is_used], kept[is_used]
        self.num_targets = int(targets[is_used].sum())
        self.num_items = len(starts)
        self.num_truncated = int((is_used & is_too_long).sum())
        self.num_dropped = int((~is_used).sum())
        self._rows = [
            [first + item for item in row]
            for first, group in self._groups()
            for row in pack_whole(group, length)
        ]

    def _fitting(self, sizes: Int[np.ndarray, "items sides"]) -> Int[np.ndarray, "items sides"]:
        """How many targets are left of each document once it is truncated."""
        return np.minimum(sizes, self.length)

    def _are_alike(
        self, starts: Int[np.ndarray, "items sides"], sizes: Int[np.ndarray, "items sides"]
    ) -> Bool[np.ndarray, " items"]:
        """Whether there is nothing to tell the documents of an item apart."""
        return np.zeros(len(starts), bool)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Batch:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        inputs, targets, segment_ids = np.zeros((3, self.length), np.int32)
        targets[:] = IGNORED_TARGET
        done, items = 0, self._rows[index]
        starts, sizes = self._starts[items].ravel().tolist(), self._sizes[items].ravel().tolist()
        for segment_id, (start, size) in enumerate(zip(starts, sizes, strict=True), start=1):
            tokens = self._tokens.read(start, start + size + 1)
            mask = self._tokens.read_mask(start + 1, start + size + 1)
            own = slice(done, done + size)
            inputs[own] = tokens[:-1]
            targets[own] = np.where(mask, tokens[1:].astype(np.int32), IGNORED_TARGET)
            segment_ids[own] = segment_id
            done += size
        return Batch(inputs, targets, segment_ids)

    @property
    def padding(self) -> float:
        """Share of positions that are padding."""
        return 1 - int(self._sizes.sum()) / (len(self) * self.length)

    def describe_left_out(self) -> str | None:
        """What is not in the rows, in words; None if everything is."""
        counts = [f"{self.num_truncated:,} truncated"] * bool(self.num_truncated)
        counts += [f"{self.num_dropped:,} dropped"] * bool(self.num_dropped)
        if not counts:
            return None
        return (
            f"of {self.num_items:,} {self.item} {' and '.join(counts)}, as they do not fit rows "
            f"of {self.length:,} tokens"
        )

    def _count_targets(
        self, starts: Int[np.ndarray, " conversations"], sizes: Int[np.ndarray, " conversations"]
    ) -> Int[np.ndarray, " conversations"]:
        """How many of each conversation's targets the loss is on, of the first `sizes` of them."""
        counts = np.zeros(len(starts), np.int64)
        for first in range(0, len(starts), GROUP):
            group = slice(first, first + GROUP)
            begin, end = int(starts[group][0]), int((starts + sizes)[group][-1]) + 1
            before = np.append(0, np.cumsum(self._tokens.read_mask(begin, end)))
            own = starts[group] - begin + 1
            counts[group] = before[own + sizes[group]] - before[own]
        return counts

    def _groups(self) -> Iterator[tuple[int, list[int]]]:
        """The first item of each group, and the sizes of all in it."""
        for number, group in enumerate(batched(self._sizes.sum(1).tolist(), GROUP)):
            yield number * GROUP, [*group]


def pack_whole(sizes: list[int], length: int) -> list[list[int]]:
    """Packs items into as few rows as best fit needs, the largest first; which row has which.

    Args:
      sizes: of the items, at most `length` each.
      length: room of a row.
    """
    order = np.argsort(-np.array(sizes), kind="stable").tolist()
    rows: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # what is left of each row, rising, and the row
    for item in order:
        best = bisect_left(rooms, (sizes[item], 0))
        if best < len(rooms):
            room, row = rooms.pop(best)
        else:
            room, row = length, len(rows)
            rows.append([])
        rows[row].append(item)
        insort(rooms, (room - sizes[item], row))
    return rows
