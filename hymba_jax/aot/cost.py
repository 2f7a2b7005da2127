"""Cost of a compiled program per chip."""

from typing import NamedTuple

import jax

from hymba_jax.aot.collectives import by_kind, collectives
from hymba_jax.aot.estimate import Work
from hymba_jax.aot.fit import Memory, compiled_memory, refused_memory
from hymba_jax.aot.hlo import Program
from hymba_jax.aot.kernels import Kernel, kernels
from hymba_jax.aot.matmuls import matmul_flops
from hymba_jax.aot.programs import AotProgram
from hymba_jax.aot.traffic import total_hbm_bytes


class ProgramCost(NamedTuple):
    """One run of a program on one chip.

    Attributes:
      matmul_flops: without those of kernels.
      unknown_loops: loops whose trip count is unknown, counted once.
      collectives: by kind, how many and the bytes that a chip sends for them.
    """

    work: Work
    matmul_flops: float
    kernels: list[Kernel]
    unknown_loops: int
    collectives: dict[str, tuple[int, float]]


def compile_and_analyze(program: AotProgram) -> tuple[Memory, ProgramCost | None]:
    """Its memory, and its cost; no cost if it does not fit."""
    try:
        with jax.set_mesh(program.mesh):
            compiled = program.compile()
    except jax.errors.JaxRuntimeError as error:
        memory = refused_memory(error, program.arguments)
        if memory is None:
            raise
        return memory, None
    return compiled_memory(compiled), _analyze(program, Program(compiled.as_text()))


def _analyze(program: AotProgram, hlo: Program) -> ProgramCost:
    matmuls, sent, called = matmul_flops(hlo), by_kind(collectives(hlo)), kernels(hlo)
    flops = matmuls + (program.kernel_flops if called else 0)
    work = Work(flops, total_hbm_bytes(hlo), sum(size for _, size in sent.values()))
    return ProgramCost(work, matmuls, called, hlo.unknown_loops, sent)
