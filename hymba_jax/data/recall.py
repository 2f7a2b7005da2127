"""Synthetic tasks of recall, generated on the fly: a row is a pure function of seed and index.

| task                | a row                                               | answers            |
|---------------------|-----------------------------------------------------|--------------------|
| `mqar`              | pairs of key and value, then each key again at a    | the value, where   |
|                     | random place (arXiv 2312.04927)                     | its key is again   |
| `selective_copying` | symbols at random places, then as many marks        | the symbols in     |
|                     | (arXiv 2312.00752, section 4.1)                     | order, at marks    |
| `induction`         | random symbols, one behind a mark, and a mark last  | that symbol, at    |
|                     | (arXiv 2312.00752, section 4.1)                     | the last mark      |

All other places of the first two hold token 0. Only answers are targets.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast, get_args

import numpy as np

from hymba_jax.config.data import RecallName
from hymba_jax.data.batch import IGNORED_TARGET, Batch, stack_rows
from hymba_jax.errors import HymbaError

FILLER, MARK, FIRST_SYMBOL = 0, 1, 2

_NAMES = "|".join(get_args(RecallName))
_SPEC = re.compile(rf"({_NAMES}):(\d{{1,7}}):(\d{{1,7}})(?::(\d{{1,7}}))?", re.ASCII)


@dataclass(frozen=True)
class RecallTask:
    """One of the tasks at one size.

    Attributes:
      name: mqar, selective_copying or induction.
      length: tokens of a row.
      pairs: of key and value in `mqar`, symbols to copy in `selective_copying`; induction has one.
      vocab_size: tokens 2, 3, ... are symbols. Of `mqar` the first half are keys, the others
        values.

    Raises:
      HymbaError: the row, or the vocabulary, is too small for the pairs, or induction has several.
    """

    name: RecallName
    length: int
    pairs: int = 1
    vocab_size: int = 64

    def __post_init__(self) -> None:
        if self.name == "induction" and self.pairs != 1:
            raise HymbaError(f"induction: has one pair, not {self.pairs}: set 1")
        places = {"mqar": 3 * self.pairs, "selective_copying": 2 * self.pairs, "induction": 3}
        needed = places[self.name]
        if self.pairs < 1 or self.length < needed:
            raise HymbaError(
                f"{self.name}: {self.pairs} pairs take {needed} tokens, length is {self.length}"
            )
        if self.num_keys < (self.pairs if self.name == "mqar" else 1):
            raise HymbaError(
                f"{self.name}: {self.pairs} pairs take as many keys, a vocab_size of "
                f"{self.vocab_size} has {max(self.num_keys, 0)}"
            )

    @classmethod
    def parse(cls, spec: str) -> "RecallTask":
        """The task that TASK:PAIRS:LENGTH or TASK:PAIRS:LENGTH:VOCAB_SIZE names.

        Raises:
          HymbaError: it names none, or an impossible one.
        """
        match = _SPEC.fullmatch(spec)
        if match is None:
            raise HymbaError(
                f"{spec}: a generated task is TASK:PAIRS:LENGTH or TASK:PAIRS:LENGTH:VOCAB_SIZE, "
                "such as mqar:8:64"
            )
        name, pairs, length, vocab_size = match.groups(default=str(cls.vocab_size))
        return cls(cast(RecallName, name), int(length), int(pairs), int(vocab_size))

    @property
    def num_keys(self) -> int:
        """Half of the symbols."""
        return (self.vocab_size - FIRST_SYMBOL) // 2

    def row(self, seed: int, index: int) -> Batch:
        """One row, (length,) each field; targets are IGNORED_TARGET but for the answers.

        Args:
          seed: of the rows, not negative; other seeds have other rows.
        """
        inputs = np.full(self.length, FILLER, np.int32)
        targets = np.full(self.length, IGNORED_TARGET, np.int32)
        _FILL[self.name](self, np.random.default_rng((seed, index)), inputs, targets)
        return Batch(inputs, targets)

    def rows_in(self, length: int) -> int:
        """How many rows fill `length`.

        Raises:
          HymbaError: `length` is not a multiple of the task's.
        """
        count, rest = divmod(length, self.length)
        if rest or not count:
            raise HymbaError(
                f"{self.name}: rows of {self.length} tokens do not fill a sequence of {length}: "
                "let sequence_length be a multiple"
            )
        return count

    def packed_row(self, seed: int, index: int, length: int) -> Batch:
        """As many rows as fill `length`, each a document of its own; other indices have others.

        Raises:
          HymbaError: as of `rows_in`.
        """
        count = self.rows_in(length)
        rows = [self.row(seed, index * count + i) for i in range(count)]
        inputs, targets = (
            np.concatenate(each) for each in zip(*(row[:2] for row in rows), strict=True)
        )
        return Batch(
            inputs, targets, np.repeat(np.arange(1, count + 1, dtype=np.int32), self.length)
        )


def mixed_batch(
    tasks: Sequence[RecallTask], seed: int, step: int, batch_size: int, length: int
) -> Batch:
    """Packed rows of `length` tokens, of each task in turn.

    The rows of different steps are different, whichever tasks these are of.
    """
    indices = range(step * batch_size, (step + 1) * batch_size)
    return stack_rows([tasks[i % len(tasks)].packed_row(seed, i, length) for i in indices])


def _mqar(
    task: RecallTask, rng: np.random.Generator, inputs: np.ndarray, targets: np.ndarray
) -> None:
    keys = FIRST_SYMBOL + rng.choice(task.num_keys, task.pairs, replace=False)
    values = rng.integers(FIRST_SYMBOL + task.num_keys, task.vocab_size, task.pairs)
    start = 2 * task.pairs
    inputs[:start:2], inputs[1:start:2] = keys, values
    places = start + rng.choice(task.length - start, task.pairs, replace=False)
    inputs[places], targets[places] = keys, values


def _selective_copying(
    task: RecallTask, rng: np.random.Generator, inputs: np.ndarray, targets: np.ndarray
) -> None:
    symbols = rng.integers(FIRST_SYMBOL, task.vocab_size, task.pairs)
    end = task.length - task.pairs
    inputs[np.sort(rng.choice(end, task.pairs, replace=False))] = symbols
    inputs[end:], targets[end:] = MARK, symbols


def _induction(
    task: RecallTask, rng: np.random.Generator, inputs: np.ndarray, targets: np.ndarray
) -> None:
    inputs[:] = rng.integers(FIRST_SYMBOL, task.vocab_size, task.length)
    place = int(rng.integers(task.length - 2))
    inputs[place] = inputs[-1] = MARK
    targets[-1] = inputs[place + 1]


_FILL: dict[
    RecallName, Callable[[RecallTask, np.random.Generator, np.ndarray, np.ndarray], None]
] = {"mqar": _mqar, "selective_copying": _selective_copying, "induction": _induction}
