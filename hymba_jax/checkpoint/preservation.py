"""Which checkpoints of a run stay, and which of them is the best."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from orbax.checkpoint import checkpoint_managers


class Best(NamedTuple):
    """The checkpoint with the lowest validation loss.

    Attributes:
      step: of the checkpoint.
      loss: nats per target, the mean over all validation sets.
    """

    step: int
    loss: float


class Preservation(checkpoint_managers.PreservationPolicy):
    """Preserves the last checkpoints on schedule, the newest one, the best one, and some steps.

    So those on schedule do not depend on interruptions and validations, which save others.

    Args:
      keep: how many on schedule.
      is_scheduled: whether a step is.
      steps: others that stay.

    Attributes:
      best: the best so far; None before the first validation.
    """

    def __init__(
        self, keep: int, is_scheduled: Callable[[int], bool], steps: Sequence[int]
    ) -> None:
        self.best: Best | None = None
        self._keep, self._is_scheduled, self._steps = keep, is_scheduled, steps

    def improves(self, step: int, loss: float) -> bool:
        """Whether a validation is the best so far, so that a checkpoint is due; keeps its loss."""
        if not loss < (self.best.loss if self.best else math.inf):
            return False
        self.best = Best(step, loss)
        return True

    def preserved(self, steps: Sequence[int]) -> set[int]:
        """Which of these checkpoints stay, and perhaps others; the newest is last."""
        scheduled = [step for step in steps if self._is_scheduled(step)]
        best = [self.best.step] if self.best else []
        return {*steps[-1:], *scheduled[-self._keep :], *self._steps, *best}

    def should_preserve(
        self,
        checkpoints: Sequence[checkpoint_managers.PolicyCheckpointInfo],
        *,
        context: checkpoint_managers.PreservationContext,
    ) -> list[bool]:
        """For Orbax: whether to preserve each of the checkpoints."""
        preserved = self.preserved([info.step for info in checkpoints])
        return [info.step in preserved for info in checkpoints]
