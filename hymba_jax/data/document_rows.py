"""Rows of whole documents: each document is computed as if it were alone, and few are split.

The stream is cut into blocks of equally many tokens, and each block is packed into the same number
of rows, so that row i is of block i // ROWS_PER_BLOCK and depends on that block's tokens alone:
there is no state and nothing to index. Within a block documents are packed by best fit, the longest
first. What fits into no row fills the room that is left: a block has a little fewer tokens than its
rows have positions, so that there is always enough of it, and seldom any need for that.

Packing counts targets: every token but the first of its document is one, exactly once an epoch. The
input of a target is the token before it. A document that is split, because it is longer than a row,
crosses the border of two blocks or fits nowhere, loses no target: its next piece starts with the
input that is the last target of the piece before.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from functools import cached_property

import numpy as np

from hymba_jax.data.batch import IGNORED_TARGET, Batch
from hymba_jax.data.token_store import TokenStore
from hymba_jax.types import Int

ROWS_PER_BLOCK = 64
"""More leave fewer documents at the borders of blocks, and take longer to pack."""

SLACK = 256
"""One in so many positions of a block's rows is free, or more. With 64 rows of 2048 positions, and
documents of 500 tokens on average, hardly any document is split then that need not be."""


type Piece = tuple[int, int, int]
"""Targets of one document: its number among those that are packed, how many of its targets are
before these, and how many these are."""


class DocumentRows:
    """The rows that a source's documents are packed into, a data source for Grain.

    Record i is row i of a batch. Its documents have the segment ids 1, 2, ... and behind them is
    padding, of segment 0.

    Args:
      tokens: a source whose documents are told apart.
      length: positions of a row.
    """

    def __init__(self, tokens: TokenStore, length: int) -> None:
        self._tokens, self.length = tokens, length
        positions = ROWS_PER_BLOCK * length
        self._block = positions - -(-positions // SLACK)

    @cached_property
    def num_targets(self) -> int:
        """Tokens that are predicted, in all rows; counting documents may read all tokens."""
        documents = self._tokens.num_documents
        if documents is None:
            blocks = range(0, self._tokens.num_tokens, self._block)
            stops = (min(start + self._block, self._tokens.num_tokens) for start in blocks)
            documents = sum(
                len(self._tokens.document_starts(start, stop))
                for start, stop in zip(blocks, stops, strict=True)
            )
        return self._tokens.num_tokens - documents

    @property
    def padding(self) -> float:
        """Share of positions that are padding: of the first block, if documents are not counted."""
        num_targets, num_rows = self._tokens.num_tokens, len(self)
        if self._tokens.num_documents is None:
            stop = min(self._block, num_targets)
            num_targets, num_rows = int(self._fragments(0, stop)[1].sum()), self._num_rows(stop)
        else:
            num_targets = self.num_targets
        return 1 - num_targets / (num_rows * self.length)

    def __len__(self) -> int:
        blocks, rest = divmod(self._tokens.num_tokens, self._block)
        return blocks * ROWS_PER_BLOCK + self._num_rows(rest)

    def __getitem__(self, index: int) -> Batch:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        block, row = divmod(index, ROWS_PER_BLOCK)
        start = block * self._block
        stop = min(start + self._block, self._tokens.num_tokens)
        firsts, sizes = self._fragments(start, stop)
        rows = pack_fragments(sizes, self._num_rows(stop - start), self.length)
        return self._row([(int(firsts[i]) + offset, size) for i, offset, size in rows[row]])

    def _num_rows(self, tokens: int) -> int:
        """Rows of a block with so many tokens, which is smaller at the end of the source."""
        return -(-tokens * ROWS_PER_BLOCK // self._block)

    def _fragments(
        self, start: int, stop: int
    ) -> tuple[Int[np.ndarray, " _"], Int[np.ndarray, " _"]]:
        """The first target, and the number of targets, of each document of a block."""
        starts = self._tokens.document_starts(start, stop)
        firsts = np.concatenate([[start], starts + 1])
        sizes = np.concatenate([starts, [stop]]) - firsts
        return firsts[sizes > 0], sizes[sizes > 0]

    def _row(self, pieces: Sequence[tuple[int, int]]) -> Batch:
        """A row of these pieces: where their targets start in the stream, and how many they are."""
        inputs, targets, segment_ids = np.zeros((3, self.length), np.int32)
        targets[:] = IGNORED_TARGET
        done = 0
        for segment_id, (first, size) in enumerate(pieces, start=1):
            tokens = self._tokens.read(first - 1, first + size)
            inputs[done : done + size] = tokens[:-1]
            targets[done : done + size] = tokens[1:]
            segment_ids[done : done + size] = segment_id
            done += size
        return Batch(inputs, targets, segment_ids)


def pack_fragments(
    sizes: Int[np.ndarray, " fragments"], num_rows: int, length: int
) -> list[list[Piece]]:
    """Packs fragments into rows by best fit, the largest first; which row has which pieces.

    Of a fragment longer than a row, pieces of a whole row come first, then its remainder. What fits
    into no row waits until all that does is placed, then fills the room that is left.

    Args:
      sizes: all together at most `num_rows * length`.
      length: positions of a row.
    """
    rows: list[list[Piece]] = [[] for _ in range(num_rows)]
    # The room in each row, rising; numbers, as they compare faster than tuples.
    rooms = [length * num_rows + row for row in range(num_rows)]
    queue = _pieces(sizes, length)
    num_pieces = len(queue)
    for turn, (fragment, offset, size) in enumerate(queue):
        best = bisect_left(rooms, size * num_rows)
        if best == len(rooms):
            if turn < num_pieces:
                queue.append((fragment, offset, size))
                continue
            best, part = -1, rooms[-1] // num_rows
            queue.append((fragment, offset + part, size - part))
            size = part
        room = rooms.pop(best)
        rows[room % num_rows].append((fragment, offset, size))
        if room >= (size + 1) * num_rows:
            insort(rooms, room - size * num_rows)
    return rows


def _pieces(sizes: Int[np.ndarray, " fragments"], length: int) -> list[Piece]:
    """The fragments in pieces of at most a row, the largest first."""
    counts = -(-sizes // length)
    fragments = np.repeat(np.arange(len(sizes)), counts)
    offsets = length * (np.arange(len(fragments)) - np.repeat(np.cumsum(counts) - counts, counts))
    in_pieces = np.minimum(sizes[fragments] - offsets, length)
    order = np.argsort(-in_pieces, kind="stable")
    columns = (values[order].tolist() for values in (fragments, offsets, in_pieces))
    return list(zip(*columns, strict=True))
