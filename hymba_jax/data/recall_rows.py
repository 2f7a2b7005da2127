"""A generated task of recall as a source, which has a fixed number of rows as a file would have.

So its rows are shuffled, shared and resumed as those of any other source, and nothing is stored.
"""

import hashlib
from dataclasses import dataclass
from functools import cached_property

from hymba_jax.data.batch import Batch
from hymba_jax.data.recall import RecallTask

TRAIN_ROWS = 2**20
"""Of an epoch of training."""

VALIDATION_ROWS = 512

_DIGESTED = 8  # documents


class RecallRows:
    """The rows that the documents of a task fill, a data source for Grain.

    Record i is row i of a batch. Its documents have the segment ids 1, 2, ...

    Args:
      task: what is generated.
      length: positions of a row.
      seed: of the documents.
      num_rows: how many rows there are.

    Attributes:
      num_targets: answers, in all rows.
      padding: share of positions that are padding.

    Raises:
      HymbaError: `length` is not a multiple of the task's.
    """

    padding = 0.0

    def __init__(self, task: RecallTask, length: int, seed: int, num_rows: int) -> None:
        self._task, self.length, self._seed, self._num_rows = task, length, seed, num_rows
        self.num_targets = num_rows * task.rows_in(length) * task.pairs

    def __len__(self) -> int:
        return self._num_rows

    def __getitem__(self, index: int) -> Batch:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        return self._task.packed_row(self._seed, index, self.length)


@dataclass(frozen=True)
class RecallSource:
    """A task as a source of training, or of validation, which is sampled from another seed.

    Attributes:
      task: what is generated.
      is_held_out: whether it is for validation.
      label: what messages call it.
      is_preference: as of `Tokens`.
    """

    task: RecallTask
    is_held_out: bool
    label: str

    is_preference = False

    @property
    def num_rows(self) -> int:
        """Those of any length."""
        return VALIDATION_ROWS if self.is_held_out else TRAIN_ROWS

    @cached_property
    def digest(self) -> str:
        """Of the first documents: another version of NumPy may sample others."""
        digest = hashlib.blake2b(digest_size=16)
        for index in range(_DIGESTED):
            row = self.task.row(self._seed, index)
            digest.update(row.inputs.tobytes() + row.targets.tobytes())
        return digest.hexdigest()

    def rows(self, length: int) -> RecallRows:
        """Rows of so many positions. Raises HymbaError unless the task's documents fill them."""
        return RecallRows(self.task, length, self._seed, self.num_rows)

    @property
    def _seed(self) -> int:
        return int(self.is_held_out)
