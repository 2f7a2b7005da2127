"""The training examples of a run: example i is a pure function of the seed and i.

A mixture says which source it is from and how many of that source are before it; a permutation for
each epoch says which row of the source it is. So there is no state but the number of examples
taken, and a run resumes exactly on any number of processes and devices.
"""

import sys
from collections.abc import Mapping
from fractions import Fraction
from types import MappingProxyType
from typing import NamedTuple

from hymba_jax.data.batch import Batch
from hymba_jax.data.conversation_rows import ConversationRows
from hymba_jax.data.document_rows import DocumentRows
from hymba_jax.data.mixture import Mixture
from hymba_jax.data.permutation import shuffled_row
from hymba_jax.data.recall_rows import RecallRows
from hymba_jax.data.windows import Windows

type Rows = Windows | DocumentRows | ConversationRows | RecallRows
"""The rows of a source, by index, each with the same fields."""


# Examples that a message names.
_NAMED = 8


class Origin(NamedTuple):
    """Where an example is from: the row of a source, in an epoch counted from 0."""

    source: str
    epoch: int
    row: int


class Read(NamedTuple):
    """How much of a source a run has read, in all of its stages.

    Attributes:
      sequences: examples of it.
      epochs: how often they go through it.
    """

    sequences: int = 0
    epochs: Fraction = Fraction()


class Examples:
    """The endless training examples, by index.

    Args:
      rows: those of an epoch, by source; none empty.
      mixture: of the same sources.
      seed: not negative.
      order: of the orders that there are for a seed.
      taken: how many examples of each source are taken already, by another mixture.
      read: what the run has read before, in this order and in others.

    Attributes:
      rows: as given.
    """

    def __init__(
        self,
        rows: Mapping[str, Rows],
        mixture: Mixture,
        seed: int,
        order: int = 0,
        taken: Mapping[str, int] = MappingProxyType({}),
        read: Mapping[str, Read] = MappingProxyType({}),
    ) -> None:
        self.rows, self._mixture, self._seed = rows, mixture, seed
        self._order, self._taken, self._read = order, taken, read

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: int) -> Batch:
        source, _, row = self.origin(index)
        return self.rows[source][row]

    def origin(self, index: int) -> Origin:
        """Where an example is from."""
        source, position = self._mixture(index)
        position += self._taken.get(source, 0)
        key = f"{source}#{self._order}" if self._order else source
        return Origin(source, *shuffled_row(position, len(self.rows[source]), self._seed, key))

    def counts(self, examples: int) -> dict[str, int]:
        """How many of each source are taken with the first `examples`."""
        counts = self._mixture.counts(examples)
        return {
            name: counts.get(name, 0) + self._taken.get(name, 0)
            for name in dict.fromkeys([*self._taken, *counts])
        }

    def read(self, examples: int) -> dict[str, Read]:
        """What the run has read of each source with the first `examples`."""
        read = dict(self._read)
        for name, count in self._mixture.counts(examples).items():
            before = read.get(name, Read())
            epochs = before.epochs + Fraction(count, len(self.rows[name]))
            read[name] = Read(before.sequences + count, epochs)
        return read

    def left_out(self) -> list[str]:
        """Which conversations of each source are not in its rows, in words, a line each."""
        return [
            f"{name}: {line}"
            for name, rows in self.rows.items()
            if isinstance(rows, ConversationRows) and (line := rows.describe_left_out())
        ]

    def padding(self) -> list[str]:
        """How much of the rows of packed documents is padding, in words, a line each."""
        return [
            f"{name}: packed as documents, {rows.padding:.1%} of its rows of {rows.length:,} "
            "positions is padding"
            for name, rows in self.rows.items()
            if not isinstance(rows, Windows)
        ]

    def describe(self, start: int, stop: int) -> str:
        """Where these examples are from, in words; of many the first few."""
        origins = map(self.origin, range(start, min(stop, start + _NAMED)))
        named = ", ".join(f"{origin.source} {origin.row}" for origin in origins)
        more = f" and {stop - start - _NAMED} more" if stop - start > _NAMED else ""
        return f"sequences {start} to {stop - 1} (rows {named}{more})"

    def progress(self, examples: int) -> dict[str, int | float]:
        """Metrics of what the run has read with the first `examples`.

        `epoch` is how often it went through the source; of several sources, `sequences/NAME` and
        `epoch/NAME` are those of each.
        """
        read = self.read(examples)
        epochs = {name: round(float(each.epochs), 4) for name, each in read.items()}
        if len(read) == 1:
            return {"epoch": next(iter(epochs.values()))}
        sequences = {f"sequences/{name}": each.sequences for name, each in read.items()}
        return sequences | {f"epoch/{name}": epoch for name, epoch in epochs.items()}
