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
      unknown_loops: loops whose trip count is unknown, counted once.
      collectives: by kind, how many and the bytes that a chip sends for them.
      instructions: what each costs.
    """

    work: Work
    kernels: list[Kernel]
    unknown_loops: int
    collectives: dict[str, tuple[int, float]]
    instructions: list[InstructionCost]

    @property
    def kernel_flops(self) -> float:
        """Of the matmuls in kernels."""
        return sum(kernel.flops for kernel in self.kernels)

    def step_seconds(self, chip: Chip) -> float:
        """Time of a step that runs one instruction after another, collectives beside them."""
        alone = sum(cost.seconds(chip) for cost in self.instructions)
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
    return compiled_memory(compiled), analyze(Program(compiled.as_text()), chip)


def analyze(hlo: Program, chip: Chip) -> ProgramCost:
    """What a compiled program costs."""
    costs = [*instruction_costs(hlo, chip)]
    sent = by_kind(collectives(hlo))
    work = Work(
        flops=sum(cost.flops for cost in costs),
        hbm_bytes=sum(cost.hbm_bytes for cost in costs),
        collective_bytes=sum(size for _, size in sent.values()),
    )
    return ProgramCost(work, kernels(hlo), hlo.unknown_loops, sent, costs)
