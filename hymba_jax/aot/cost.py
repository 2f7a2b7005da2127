"""Cost of a compiled program per chip."""

from typing import NamedTuple

import jax

from hymba_jax.aot.collectives import by_kind, collectives
from hymba_jax.aot.estimate import Work
from hymba_jax.aot.fit import Memory, compiled_memory, refused_memory
from hymba_jax.aot.hlo import Program
from hymba_jax.aot.instructions import InstructionCost, instruction_costs
from hymba_jax.aot.kernels import Kernel, kernels
from hymba_jax.aot.programs import AotProgram
from hymba_jax.aot.topology import Chip


class ProgramCost(NamedTuple):
    """One run of a program on one chip.

    Attributes:
      matmul_flops: without those of kernels.
      unknown_loops: loops whose trip count is unknown, counted once.
      collectives: by kind, how many and the bytes that a chip sends for them.
      instructions: what each costs.
    """

    work: Work
    matmul_flops: float
    kernels: list[Kernel]
    unknown_loops: int
    collectives: dict[str, tuple[int, float]]
    instructions: list[InstructionCost]

    def step_seconds(self, chip: Chip) -> float:
        """Time of a step that runs one instruction after another, collectives beside them."""
        in_kernels = (self.work.flops - self.matmul_flops) / chip.peak_flops
        alone = sum(cost.seconds(chip) for cost in self.instructions) + in_kernels
        return max(alone, self.work.seconds(chip)["interconnect"])


def compile_and_analyze(program: AotProgram, chip: Chip) -> tuple[Memory, ProgramCost | None]:
    """Its memory, and its cost; no cost if it does not fit."""
    try:
        with jax.set_mesh(program.mesh):
            compiled = program.compile()
    except jax.errors.JaxRuntimeError as error:
        memory = refused_memory(error, program.arguments)
        if memory is None:
            raise
        return memory, None
    return compiled_memory(compiled), _analyze(program, Program(compiled.as_text()), chip)


def _analyze(program: AotProgram, hlo: Program, chip: Chip) -> ProgramCost:
    costs = [*instruction_costs(hlo, chip)]
    matmuls = sum(cost.flops for cost in costs)
    sent, called = by_kind(collectives(hlo)), kernels(hlo)
    flops = matmuls + (program.kernel_flops if called else 0)
    moved = sum(cost.hbm_bytes for cost in costs)
    work = Work(flops, moved, sum(size for _, size in sent.values()))
    return ProgramCost(work, matmuls, called, hlo.unknown_loops, sent, costs)
