"""A mixture of sources: which source example i is from, and which of its examples it is.

Shares hold at every moment: among the first i examples, a source has i times its share, give or
take less than one. The order repeats after a period, the common denominator of the shares, and
within it follows a schedule that is computed once: example j of a source with share s has to be
between floor(j / s) and ceil((j + 1) / s) - 1, and of those that may come next the one does that
has to come first. A schedule of this kind always exists (Tijdeman, "The chairman assignment
problem", 1980), and earliest deadline first finds it (Steiner and Yeomans, "Level schedules for
mixed-model, just-in-time processes", 1993).
"""

import heapq
import math
from collections.abc import Mapping
from fractions import Fraction

import numpy as np

from hymba_jax.errors import HymbaError
from hymba_jax.types import Int, UInt

LONGEST_PERIOD = 1 << 16
"""Shares are multiples of one over this, where the weights have no smaller common denominator."""


class Mixture:
    """Sources, with the share of the examples that each has.

    Args:
      weights: by source; they need not sum to 1.

    Attributes:
      shares: those that are kept, by source: exactly those of the weights as they are written in
        decimals, if a period has room for them, else the nearest that it has room for.
      unused: sources whose weight is zero, which have no examples.

    Raises:
      HymbaError: no weight is above zero, or one is negative, not finite, or so small that a
        period has no example of it.
    """

    def __init__(self, weights: Mapping[str, float]) -> None:
        _check(weights)
        self.unused = [name for name, weight in weights.items() if not weight]
        used = {name: weight for name, weight in weights.items() if weight}
        self._names, numbers = list(used), _numbers(used)
        self._period = sum(numbers)
        self._numbers = np.array(numbers)
        self.shares = {
            name: Fraction(number, self._period) for name, number in zip(used, numbers, strict=True)
        }
        self._schedule, self._ranks = _schedule(numbers)

    def __call__(self, example: int) -> tuple[str, int]:
        """The source of an example, and its position among the examples of this source."""
        periods, slot = divmod(example, self._period)
        source = self._schedule[slot]
        position = periods * int(self._numbers[source]) + int(self._ranks[slot])
        return self._names[source], position

    def counts(self, examples: int) -> dict[str, int]:
        """How many of the first examples are from each source."""
        periods, slots = divmod(examples, self._period)
        in_last = np.bincount(self._schedule[:slots], minlength=len(self._names))
        counts = periods * self._numbers + in_last
        return dict(zip(self._names, counts.tolist(), strict=True))


def _check(weights: Mapping[str, float]) -> None:
    for name, weight in weights.items():
        if not math.isfinite(weight) or weight < 0:
            raise HymbaError(f"mixture: the weight of {name!r} is {weight}: give one from 0 up")
    if not any(weights.values()):
        raise HymbaError("mixture: no source has a weight above 0")


def _numbers(weights: Mapping[str, float]) -> list[int]:
    """Examples of each source in a period."""
    exact = [Fraction(repr(float(weight))) for weight in weights.values()]
    shares = [weight / sum(exact) for weight in exact]
    period = math.lcm(*(share.denominator for share in shares))
    if period <= LONGEST_PERIOD:
        return [int(share * period) for share in shares]
    numbers = [math.floor(share * LONGEST_PERIOD) for share in shares]
    remainders = [share * LONGEST_PERIOD % 1 for share in shares]
    left = LONGEST_PERIOD - sum(numbers)
    for source in sorted(range(len(shares)), key=remainders.__getitem__, reverse=True)[:left]:
        numbers[source] += 1
    for (name, weight), number in zip(weights.items(), numbers, strict=True):
        if not number:
            raise HymbaError(
                f"mixture: the weight of {name!r}, {weight}, is less than 1 in {LONGEST_PERIOD} of "
                "all: raise it or leave the source out"
            )
    return numbers


def _schedule(numbers: list[int]) -> tuple[UInt[np.ndarray, " period"], Int[np.ndarray, " period"]]:
    """The source of each slot of a period, and how many slots before it are of the same source."""
    period = sum(numbers)
    released: list[list[tuple[int, int]]] = [[] for _ in range(period + 1)]
    released[0] = [(_deadline(0, number, period), source) for source, number in enumerate(numbers)]
    ready: list[tuple[int, int]] = []
    taken = [0] * len(numbers)
    schedule, ranks = np.empty(period, np.uint16), np.empty(period, np.int32)
    for slot in range(period):
        for job in released[slot]:
            heapq.heappush(ready, job)
        _, source = heapq.heappop(ready)
        schedule[slot], ranks[slot] = source, taken[source]
        taken[source] += 1
        release = max(slot + 1, taken[source] * period // numbers[source])
        released[release].append((_deadline(taken[source], numbers[source], period), source))
    return schedule, ranks


def _deadline(example: int, number: int, period: int) -> int:
    """The last slot that an example of a source may have."""
    return -(-(example + 1) * period // number) - 1
