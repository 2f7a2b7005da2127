"""The kernels that a compiled program calls, their arrays' size, and what they say they cost."""

import math
import re
from typing import NamedTuple

from hymba_jax.aot.hlo import Instruction, Program

# What the names of attention's and the scan's custom calls have in common.
_KERNEL = re.compile(
    r'custom_call_target="(?:tpu_custom_call|mosaic_gpu\w*|__gpu\$xla\.gpu\.triton|__cudnn\$fmha\w*)"'
)


class Kernel(NamedTuple):
    """A kernel of a program.

    Attributes:
      calls: per run of the program.
      shape: of its largest operand or result on a chip.
      flops: of the matmuls in all its calls, as it states them.
    """

    name: str
    calls: int
    shape: tuple[int, ...]
    flops: float


class StatedCost(NamedTuple):
    """What a kernel states of one call (`ops/kernel_cost.py`); zeros where it states nothing."""

    flops: float = 0.0
    exponentials: float = 0.0
    hbm_bytes: int = 0


def kernels(program: Program) -> list[Kernel]:
    """All of them by name."""
    found: dict[str, Kernel] = {}
    for name, times in program.runs():
        for line in program.computations[name]:
            for inner in program.fused(line):
                if not is_kernel(inner):
                    continue
                kernel = kernel_name(inner)
                _, calls, shape, flops = found.get(kernel, Kernel(kernel, 0, (), 0.0))
                arrays = [a for operand in inner.operands for a in program.arrays[operand]]
                shapes = [shape, *(array.shape for array in (*inner.results, *arrays))]
                largest = max(shapes, key=lambda shape: math.prod(shape) if shape else 0)
                flops += times * stated_cost(inner).flops
                found[kernel] = Kernel(kernel, calls + times, largest, flops)
    return [found[name] for name in sorted(found)]


def is_kernel(line: Instruction) -> bool:
    """Whether an instruction calls a kernel."""
    return line.op == "custom-call" and bool(_KERNEL.search(line.attributes))


def kernel_name(line: Instruction) -> str:
    """As JAX traced it: what is inside `jvp(...)`, before the primitive that calls a kernel."""
    traced = re.search(r'op_name="(.*?)(?:/pallas_call|/mpmd_map)?"', line.attributes)
    path = traced[1] if traced else line.name.rstrip(".0123456789")
    return re.findall(r"\w+", path)[-1]


def stated_cost(line: Instruction) -> StatedCost:
    """What a call of a kernel states."""

    text = line.attributes.replace(r"\22", '"')  # as GPUs' compiler writes quotes

    def field(name: str) -> int:
        found = re.search(rf'"{name}": ?"?(\d+)', text)
        return int(found[1]) if found else 0

    return StatedCost(field("flops"), field("transcendentals"), field("bytes_accessed"))
