"""A mixture of sources: which source example i is from, and which of its examples it is.

Shares hold at every moment: among the first i examples, a source has i times its share, give or
take less than one. So example j of a source with share s has to be between floor(j / s) and
ceil((j + 1) / s) - 1, and of those that may come next the one does that has to come first. A
schedule of this kind always exists (Tijdeman, "The chairman assignment problem", 1980), and
earliest deadline first finds it (Steiner and Yeomans, "Level schedules for mixed-model,
just-in-time processes", 1993).

Any example is found without those before its block. Where counts are rounded shares, it is enough
for the deadlines after them that those sources are rounded up which have to come first; `_counts`
schedules one block from there. What it arrives at begins the next block: the deadlines after it can
be met, as they were by this schedule, and what the block before has to hold fits into it.
"""

import heapq
import math
from collections.abc import Mapping
from fractions import Fraction
from functools import lru_cache

from hymba_jax.errors import HymbaError

BLOCK = 1 << 10
"""Examples that are scheduled together."""


class Mixture:
    """Sources, with the share of the examples that each has.

    Args:
      weights: by source; they need not sum to 1.

    Attributes:
      shares: by source, exactly those of the weights as they are written in decimals.
      unused: sources whose weight is zero, which have no examples.

    Raises:
      HymbaError: no weight is above zero, or one is negative or not finite.
    """

    def __init__(self, weights: Mapping[str, float]) -> None:
        _check(weights)
        self.unused = [name for name, weight in weights.items() if not weight]
        used = {name: Fraction(repr(float(weight))) for name, weight in weights.items() if weight}
        self.shares = {name: weight / sum(used.values()) for name, weight in used.items()}
        self._names = list(used)
        self._period = math.lcm(*(share.denominator for share in self.shares.values()))
        self._numbers = tuple(int(share * self._period) for share in self.shares.values())

    def __call__(self, example: int) -> tuple[str, int]:
        """The source of an example, and its position among the examples of this source."""
        block, slot = divmod(example, BLOCK)
        schedule, positions = _block(self._numbers, self._period, block)
        return self._names[schedule[slot]], positions[slot]

    def counts(self, examples: int) -> dict[str, int]:
        """How many of the first examples are from each source."""
        block, slots = divmod(examples, BLOCK)
        counts = _counts(self._numbers, self._period, block)
        schedule, _ = _block(self._numbers, self._period, block)
        return {
            name: count + schedule[:slots].count(source)
            for source, (name, count) in enumerate(zip(self._names, counts, strict=True))
        }


def _check(weights: Mapping[str, float]) -> None:
    for name, weight in weights.items():
        if not math.isfinite(weight) or weight < 0:
            raise HymbaError(f"mixture: the weight of {name!r} is {weight}: give one from 0 up")
    if not any(weights.values()):
        raise HymbaError("mixture: no source has a weight above 0")


# The last blocks that were asked for: training and its metrics read a few that are close together.
@lru_cache(maxsize=16)
def _block(
    numbers: tuple[int, ...], period: int, block: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The source of each example of a block, and its position among those of the source.

    Args:
      numbers, period: the shares, as numerators and their common denominator.
    """
    start, stop = (_counts(numbers, period, number) for number in (block, block + 1))
    return _schedule(numbers, period, block * BLOCK, start, stop)


@lru_cache(maxsize=16)
def _counts(numbers: tuple[int, ...], period: int, block: int) -> tuple[int, ...]:
    """How many examples of each source are before a block."""
    if not block:
        return (0,) * len(numbers)
    before = (block - 1) * BLOCK
    counts = [before * number // period for number in numbers]
    first = sorted(
        (source for source, number in enumerate(numbers) if before * number % period),
        key=lambda source: _deadline(counts[source], numbers[source], period),
    )
    for source in first[: before - sum(counts)]:
        counts[source] += 1
    schedule, _ = _schedule(numbers, period, before, tuple(counts))
    return tuple(count + schedule.count(source) for source, count in enumerate(counts))


def _schedule(
    numbers: tuple[int, ...],
    period: int,
    first: int,
    counts: tuple[int, ...],
    limits: tuple[int, ...] | None = None,
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The source of each example of a block, and its position among those of the source.

    Args:
      first: the first example of the block.
      counts: how many examples of each source are before it.
      limits: and how many before the next one; as they come if absent.
    """
    released: list[list[tuple[int, int]]] = [[] for _ in range(BLOCK)]
    taken = list(counts)

    def release(source: int, slot: int) -> None:
        """Makes the next example of a source one that may come, at the slot or later."""
        if limits and taken[source] == limits[source]:
            return
        slot = max(slot, taken[source] * period // numbers[source] - first)
        if slot < BLOCK:
            deadline = _deadline(taken[source], numbers[source], period)
            released[slot].append((deadline, source))

    for source in range(len(numbers)):
        release(source, 0)
    ready: list[tuple[int, int]] = []
    schedule, positions = [], []
    for slot in range(BLOCK):
        for job in released[slot]:
            heapq.heappush(ready, job)
        _, source = heapq.heappop(ready)
        schedule.append(source)
        positions.append(taken[source])
        taken[source] += 1
        release(source, slot + 1)
    return tuple(schedule), tuple(positions)


def _deadline(example: int, number: int, period: int) -> int:
    """The last place that an example of a source may have."""
    return -(-(example + 1) * period // number) - 1
