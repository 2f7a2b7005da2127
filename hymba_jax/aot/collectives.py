"""Collectives of a compiled program."""

import math
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from hymba_jax.aot.hlo import Instruction, Program


class Collective(NamedTuple):
    """A collective of a program.

    Attributes:
      trip_count: executions.
      group: participating chips.
      size: input bytes per chip.
    """

    kind: str
    trip_count: int
    group: int
    size: int

    @property
    def bytes_sent(self) -> float:
        """Bytes that each chip has to send in total, for any algorithm."""
        return self.trip_count * self.size * _SENT[self.kind](self.group)


# On TPUs a collective may run beside fusions, which then contain it, as do its start and its end.
# Channels do not tell one from another: equal layers share them.
_BESIDE, _DONE = "async_collective_fusion", "async-collective-done"

# Of what a chip brings, in a group of n. A sum is scattered, then gathered.
_SENT = {
    "all-gather": lambda n: n - 1,
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "reduce-scatter": lambda n: (n - 1) / n,
    "all-to-all": lambda n: (n - 1) / n,
    "collective-permute": lambda n: 1,
}


def collectives(program: Program) -> Iterator[Collective]:
    """All collectives; branches are left out."""
    for name, trip_count in program.runs():
        for line in program.computations[name]:
            if line.called.startswith(_BESIDE) or line.name.startswith(_DONE):
                continue
            # Reduce-scatters, as TPUs write them.
            scatters = line.called.startswith("all-reduce-scatter")
            for inner in program.fused(line):
                kind = inner.op.removesuffix("-start")
                if kind not in _SENT:
                    continue
                yield Collective(
                    "reduce-scatter" if scatters else kind,
                    trip_count,
                    _group(program, inner),
                    sum(a.data_size for name in inner.operands for a in program.arrays[name]),
                )


def by_kind(found: Iterable[Collective]) -> dict[str, tuple[int, float]]:
    """How many of each kind are run, and the bytes that each chip sends for them."""
    totals: dict[str, tuple[int, float]] = {}
    for collective in found:
        count, sent = totals.get(collective.kind, (0, 0.0))
        totals[collective.kind] = (count + collective.trip_count, sent + collective.bytes_sent)
    return totals


def _group(program: Program, line: Instruction) -> int:
    """Chips that take part together: of groups that are listed, counted, or axes of a mesh."""
    text = line.attributes
    if axes := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", text):
        sizes = {name: int(size) for name, size in re.findall(r"'([^']*)'=(\d+)", axes[1])}
        parts = re.findall(r"'([^']*)'(?::\(\d+\)(\d+))?", axes[2])
        return math.prod(int(part) if part else sizes[name] for name, part in parts)
    if counted := re.search(r"replica_groups=\[\d+,(\d+)\]", text):
        return int(counted[1])
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", text):
        return len(listed[1].split(","))
    return program.num_devices
