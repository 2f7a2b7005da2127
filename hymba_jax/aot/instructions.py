"""What each instruction of a compiled program costs, and which part of the model it belongs to."""

import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from hymba_jax.aot.hlo import Instruction, Program
from hymba_jax.aot.kernel_time import kernel_seconds
from hymba_jax.aot.kernels import is_kernel, kernel_name, stated_cost
from hymba_jax.aot.matmuls import instruction_flops
from hymba_jax.aot.topology import Chip
from hymba_jax.aot.traffic import hbm_bytes

# Scopes that the model and the ops open, as they appear in the paths of `op_name`.
_SCOPES = ("embedding", "attention", "ssm", "mlp", "projection", "norm", "rope", "conv", "logits")
_LAYERS = {"run_full_forward", "run_block"}


class InstructionCost(NamedTuple):
    """All runs of an instruction on one chip.

    Attributes:
      part: of the model, `ssm/conv` for example.
      flops: of matmuls, those in kernels included.
      hbm_bytes: read and written.
      kernel_seconds: that a kernel of ours takes by its own schedule; 0 for others.
    """

    part: str
    flops: float
    hbm_bytes: float
    kernel_seconds: float

    def seconds(self, chip: Chip) -> float:
        """Matmuls, HBM and a kernel's own instructions overlap within it, not beyond it."""
        return max(
            self.flops / chip.peak_flops, self.hbm_bytes / chip.bandwidth, self.kernel_seconds
        )


def instruction_costs(program: Program, chip: Chip) -> Iterator[InstructionCost]:
    """Of every instruction outside of fusions that costs anything."""
    for name, times in program.runs():
        for line in program.computations[name]:
            inner = [*program.fused(line)]
            kernels = [instruction for instruction in inner if is_kernel(instruction)]
            flops = sum(instruction_flops(program, instruction) for instruction in inner) + sum(
                stated_cost(kernel).flops for kernel in kernels
            )
            seconds = sum(kernel_seconds(kernel, chip) for kernel in kernels)
            costs = (flops, hbm_bytes(program, line), seconds)
            if any(costs):
                yield InstructionCost(part_of(line, inner), *(times * cost for cost in costs))


def part_of(line: Instruction, inner: Iterable[Instruction]) -> str:
    """The scopes in which an instruction was traced; those of a fusion are its root's, or else of
    the last in it that has any."""
    for instruction in (line, *reversed([*inner])):
        if is_kernel(instruction):
            return kernel_name(instruction)
        path = re.search(r'op_name="([^"]*)"', instruction.attributes)
        words = re.findall(r"\w+", path[1]) if path else []
        if scopes := [word for word in words if word in _SCOPES]:
            return "/".join(dict.fromkeys(scopes))
        if _LAYERS & {*words}:
            return "residual stream and fusion of heads"
    return "optimizer, gradient accumulation and the rest"


def by_part(costs: Iterable[InstructionCost], chip: Chip) -> dict[str, tuple[float, float]]:
    """Seconds and HBM bytes of each part, those with the most seconds first."""
    totals: dict[str, tuple[float, float]] = {}
    for cost in costs:
        seconds, size = totals.get(cost.part, (0.0, 0.0))
        totals[cost.part] = (seconds + cost.seconds(chip), size + cost.hbm_bytes)
    return dict(sorted(totals.items(), key=lambda item: -item[1][0]))
