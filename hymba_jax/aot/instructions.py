"""What each instruction of a compiled program costs, and which part of the model it belongs to."""

import re
from collections.abc import Iterable, Iterator, Sequence
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
      hidden_seconds: of its time, those in which other instructions are computing.
    """

    part: str
    flops: float
    hbm_bytes: float
    kernel_seconds: float
    hidden_seconds: float = 0.0

    def seconds(self, chip: Chip) -> float:
        """That it adds to a step. Matmuls, HBM and a kernel's own instructions overlap within it,
        and beyond it what is hidden."""
        return (
            max(self.flops / chip.peak_flops, self.hbm_bytes / chip.bandwidth, self.kernel_seconds)
            - self.hidden_seconds
        )


def instruction_costs(program: Program, chip: Chip) -> Iterator[InstructionCost]:
    """Of every instruction outside of fusions that costs anything."""
    for name, times in program.runs():
        lines = program.computations[name]
        alone = [_cost(program, line, chip) for line in lines]
        for part, *costs in hide_copies(lines, alone, chip):
            if any(costs):
                yield InstructionCost(part, *(times * cost for cost in costs))


def _cost(program: Program, line: Instruction, chip: Chip) -> InstructionCost:
    """Of one run of an instruction."""
    inner = [*program.fused(line)]
    kernels = [instruction for instruction in inner if is_kernel(instruction)]
    flops = sum(instruction_flops(program, instruction) for instruction in inner) + sum(
        stated_cost(kernel).flops for kernel in kernels
    )
    seconds = sum(kernel_seconds(kernel, chip) for kernel in kernels)
    return InstructionCost(part_of(line, inner), flops, hbm_bytes(program, line), seconds)


def hide_copies(
    lines: Sequence[Instruction], costs: Sequence[InstructionCost], chip: Chip
) -> list[InstructionCost]:
    """The costs of scheduled instructions, with what is hidden of asynchronous copies.

    Such a copy, most often between HBM and a TPU's VMEM, moves its bytes while the instructions
    between its start and its end compute and leave HBM idle. Copies that run at the same time share
    that time. Loops count as if they left none.
    """
    hidden = [*costs]
    pending: dict[str, int] = {}  # copies that have not ended, by name
    for i, (line, cost) in enumerate(zip(lines, costs, strict=True)):
        if line.op.endswith("-start") and cost.hbm_bytes and not cost.flops:
            pending[line.name] = i
        elif line.op.endswith("-done"):
            pending.pop(line.operands[0], None)
        else:
            idle = cost.seconds(chip) - cost.hbm_bytes / chip.bandwidth
            for copy in pending.values():
                part = min(idle, hidden[copy].seconds(chip))
                hidden[copy] = hidden[copy]._replace(
                    hidden_seconds=hidden[copy].hidden_seconds + part
                )
                idle -= part
    return hidden


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
