"""The best checkpoint of a run: it stays beside the newest ones."""

import math
from collections.abc import Sequence
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


class PreserveBest(checkpoint_managers.PreservationPolicy):
    """Preserves the best checkpoint.

    Attributes:
      best: the best so far; None before the first validation.
    """

    def __init__(self) -> None:
        self.best: Best | None = None

    def improves(self, step: int, loss: float) -> bool:
        """Whether a validation is the best so far, so that a checkpoint is due; keeps its loss."""
        if not loss < (self.best.loss if self.best else math.inf):
            return False
        self.best = Best(step, loss)
        return True

    def should_preserve(
        self,
        checkpoints: Sequence[checkpoint_managers.PolicyCheckpointInfo],
        *,
        context: checkpoint_managers.PreservationContext,
    ) -> list[bool]:
        """For Orbax: whether to preserve each of the checkpoints."""
        return [self.best is not None and info.step == self.best.step for info in checkpoints]
