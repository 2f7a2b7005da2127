"""Loss spikes: steps whose loss is far above those before."""

import statistics
from collections import deque
from collections.abc import Iterable

_WINDOW, _FEWEST = 128, 32  # losses that one is compared with
_SIGMAS = 6  # as 128 above, of the skip-step optimizers of OLMo-core
_NORMAL = 1.4826  # standard deviations in a median absolute deviation of normal values
_SHARE = 0.01  # losses that hardly vary are no spikes


class SpikeDetector:
    """Compares each loss with the median of the 128 before it.

    A spike is above it by more than 6 standard deviations, as estimated from the median absolute
    deviation, which earlier spikes hardly change; and by more than 1 % of it.

    Args:
      losses: the last ones of a run that is resumed.
    """

    def __init__(self, losses: Iterable[float] = ()):
        self._losses = deque(losses, _WINDOW)

    @property
    def losses(self) -> list[float]:
        """What a resumed run continues with."""
        return list(self._losses)

    def add(self, loss: float) -> float | None:
        """Takes the finite loss of a step; the median of those before it if it is a spike."""
        before = self.losses
        self._losses.append(loss)
        if len(before) < _FEWEST:
            return None
        median = statistics.median(before)
        deviation = statistics.median(abs(other - median) for other in before)
        bound = max(_SIGMAS * _NORMAL * deviation, _SHARE * abs(median))
        return median if loss - median > bound else None
