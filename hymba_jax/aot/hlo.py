"""An optimized HLO program, parsed from the compiler's text."""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple


class HLOArray(NamedTuple):
    """An array of a program.

    Attributes:
      size: bytes, with the padding of tiles.
      in_hbm: in HBM, not in another memory of a TPU.
      data_size: bytes without padding.
    """

    shape: tuple[int, ...]
    size: int
    in_hbm: bool
    data_size: int

    @property
    def in_hbm_size(self) -> int:
        return self.size if self.in_hbm else 0


class Instruction(NamedTuple):
    """One line of a computation.

    Attributes:
      operands: names of instructions; for parameters and constants the literal.
      called: the computation of a fusion; empty for others.
      attributes: the rest of the line.
    """

    name: str
    results: list[HLOArray]
    op: str
    operands: list[str]
    called: str
    attributes: str

    def computation(self, attribute: str) -> str:
        """The computation that an attribute names; empty if there is none."""
        found = re.search(rf"\b{attribute}=%?([\w.\-]+)", self.attributes)
        return found[1] if found else ""


class Program:
    """An optimized HLO program.

    Attributes:
      computations: the instructions of each, by name.
      arrays: the results of each instruction, by name.
      num_devices: that the program is partitioned over.
    """

    def __init__(self, text: str):
        self.computations: dict[str, list[Instruction]] = {}
        self.entry = ""
        lines: list[Instruction] = []
        text = re.sub(r"/\*.*?\*/", "", text)  # comments number the elements of tuples
        partitions = re.search(r"num_partitions=(\d+)", text.partition("\n")[0])
        self.num_devices = int(partitions[1]) if partitions else 1
        for line in text.splitlines():
            if start := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
                lines = self.computations[start[2]] = []
                self.entry = start[2] if start[1] else self.entry
            elif instruction := _instruction(line):
                lines.append(instruction)
        self.arrays = {
            line.name: line.results for lines in self.computations.values() for line in lines
        }

    def largest_loop(self) -> list[Instruction]:
        """The body of the loop that carries the most bytes; empty if there is no loop."""
        loops, size = self._lines("while"), lambda loop: sum(a.size for a in loop.results)
        largest = max(loops, key=size, default=None)
        return self.computations[largest.computation("body")] if largest else []

    def runs(self) -> Iterator[tuple[str, int]]:
        """All computations outside fusions, with how often each is run.

        A loop of unknown trip count is counted once; branches are left out.
        """
        yield from self._runs(self.entry, 1)

    def _runs(self, computation: str, times: int) -> Iterator[tuple[str, int]]:
        yield computation, times
        for line in self.computations[computation]:
            if line.op == "while":
                trips = times * (self.trip_count(line) or 1)
                yield from self._runs(line.computation("body"), trips)
            elif line.op in ("call", "async-start"):
                yield from self._runs(line.computation("to_apply") or line.called, times)

    def fused(self, line: Instruction) -> Iterator[Instruction]:
        """The instruction itself, or those of a fusion and of the fusions in it.

        What an asynchronous instruction calls is not fused: `runs` has it.
        """
        if not line.called or line.op.startswith("async-"):
            yield line
            return
        for inner in self.computations[line.called]:
            yield from self.fused(inner)

    @property
    def unknown_loops(self) -> int:
        """Loops of unknown trip count."""
        return sum(self.trip_count(line) is None for line in self._lines("while"))

    def trip_count(self, loop: Instruction) -> int | None:
        """How often a loop's body is run; None if the program does not say.

        Where only the condition tells, the counter is taken to rise from 0, as that of a scan does.
        """
        if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes):
            return int(known[1])
        condition = {line.name: line for line in self.computations[loop.computation("condition")]}
        root = [*condition.values()][-1]
        if root.op != "compare" or "direction=LT" not in root.attributes:
            return None
        counter, limit = (condition[name] for name in root.operands)
        step = self._step(loop, re.search(r"index=(\d+)", counter.attributes))
        return -(-int(limit.operands[0]) // step) if step and limit.operands[0].isdigit() else None

    def _step(self, loop: Instruction, place: re.Match[str] | None) -> int | None:
        """What an iteration of a loop adds to the counter at this position of its carry."""
        body = {line.name: line for line in self.computations[loop.computation("body")]}
        root = [*body.values()][-1]
        if place is None or root.op != "tuple":
            return None
        rise = body[root.operands[int(place[1])]]
        steps = [body[name].operands[0] for name in rise.operands if body[name].op == "constant"]
        return int(steps[0]) if rise.op == "add" and steps else None

    def _lines(self, op: str) -> Iterator[Instruction]:
        for lines in self.computations.values():
            yield from (line for line in lines if line.op == op)


def _instruction(line: str) -> Instruction | None:
    found = re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*?)\)(.*)", line)
    if found is None:
        return None
    name, results, op, operands, rest = found.groups()
    called = re.search(r"calls=%?([\w.\-]+)", rest)
    names = [word.split()[-1].lstrip("%") for word in operands.split(", ") if word]
    return Instruction(name, _arrays(results), op, names, called[1] if called else "", rest)


def _arrays(text: str) -> list[HLOArray]:
    """The arrays of a type, those of a tuple one after another."""
    found = re.findall(r"([a-z]\w*)\[([\d,]*)\](?:\{([\d,]*)(?::([^}]*))?\})?", text)
    return [_array(*parts) for parts in found]


def _array(dtype: str, dims: str, order: str, memory: str) -> HLOArray:
    shape = tuple(int(d) for d in dims.split(",") if d)
    bits = 8 if dtype == "pred" else int(re.sub(r"\D", "", dtype.split("e")[0]) or 0)
    padded = [shape[int(axis)] for axis in order.split(",") if axis]  # the minor axis first
    tile = re.search(r"T\(([\d,]+)\)", memory)
    if tile:
        for axis, size in enumerate(reversed([int(n) for n in tile[1].split(",")][-2:])):
            if axis < len(padded):
                padded[axis] += -padded[axis] % size
    size, data = (math.prod(sizes) * bits // 8 for sizes in (padded, shape))
    return HLOArray(shape, size, "S(" not in memory, data)
