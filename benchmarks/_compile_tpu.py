"""Compiles the selective scan for TPUs on a machine without one, and says what it will cost there.

VMEM and spills are the compiler's, from the allocations that it dumps, and so are cycles, those of
a position and 640 channels, from its schedules. Bytes are those that `hymba compile` counts, in
which the kernel has what it states: a block whenever its index changes. Exponentials, with all that
a TPU has the same slot for, are counted in the kernel's jaxpr.
"""

import math
import re
import tempfile
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
from _bundles import Loop, grid_loop
from _report import Row
from _scan_passes import (
    compile_scans,
    equations,
    exponentials,
    min_bytes,
    min_exponentials,
)
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from hymba_jax.aot.cost import instruction_costs
from hymba_jax.aot.hlo import Program
from hymba_jax.aot.topology import CHIPS, without_a_tpu


def compile_for_tpu(
    topology_names: Sequence[str],
    lengths: Sequence[int],
    batches: Sequence[int],
    dtypes: Sequence[str],
) -> list[Row]:
    """A row for each size and pass: inference, the forward pass of training, the backward pass."""
    with tempfile.TemporaryDirectory() as dump:
        without_a_tpu(f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true")
        rows: list[Row] = []
        for target in topology_names:
            compile_pass = partial(_compile, target, Path(dump))
            # Whose platform the kernels are traced for.
            with jax.set_mesh(chip_mesh(target)):
                rows += compile_scans(compile_pass, target, "pallas_tpu", lengths, batches, dtypes)
        return rows


class CompiledKernel(NamedTuple):
    """The only kernel of a function, compiled.

    Attributes:
      vmem, spilled: bytes of VMEM, and those among them for registers.
      limit: bytes of VMEM that it may have.
      step: the loop over its grid.
      moved: bytes of HBM that the function reads and writes.
      jaxpr: of the function.
      params: of the kernel in it.
      operands, results: the kernel's.
    """

    vmem: int
    spilled: int
    limit: int
    step: Loop
    moved: int
    jaxpr: Any
    params: Any
    operands: Any
    results: Any

    @property
    def programs(self) -> int:
        """Of its grid."""
        return math.prod(self.params["grid_mapping"].grid)

    @property
    def cycles(self) -> int:
        """Of the whole grid, if every program takes all branches."""
        return self.programs * self.step.cycles


@cache
def chip_mesh(target: str) -> Mesh:
    """A chip of a slice."""
    devices = topologies.get_topology_desc(platform="tpu", topology_name=target).devices
    return Mesh(devices[:1], ("chip",))


def compile_kernel(
    name: str, target: str, dump: Path, function: Callable[..., Any], inputs: Any
) -> CompiledKernel:
    """Compiles a function of the kernel whose name begins so, for a chip of a slice."""
    sharding = NamedSharding(chip_mesh(target), PartitionSpec())
    before = set(dump.iterdir())
    traced = jax.jit(function, in_shardings=sharding).trace(*inputs)
    compiled = traced.lower(lowering_platforms=("tpu",)).compile()
    dumped = set(dump.iterdir()) - before
    allocations, schedule = (
        next(f for f in dumped if re.search(rf"{name}.*-\d+-{stage}\.txt", f.name))
        for stage in ("post-ra", "final_bundles")
    )
    jaxpr = traced.jaxpr.jaxpr
    (kernel,) = (e for e, _ in equations(jaxpr) if e.primitive.name == "pallas_call")
    costs = instruction_costs(Program(compiled.as_text()), CHIPS[target.partition(":")[0]])
    return CompiledKernel(
        *vmem_allocations(allocations),
        kernel.params["compiler_params"].vmem_limit_bytes,
        grid_loop(schedule),
        round(sum(cost.hbm_bytes for cost in costs)),
        jaxpr,
        kernel.params,
        [v.aval for v in kernel.invars],
        [v.aval for v in kernel.outvars],
    )


def _compile(target: str, dump: Path, function: Callable[..., Any], inputs: Any) -> Row:
    try:
        kernel = compile_kernel("selective_scan", target, dump, function, inputs)
    except Exception as error:  # reported as a row
        return {"compiled": str(error).splitlines()[0][:60]}
    taken = kernel.programs * exponentials(kernel.params["jaxpr"])
    batch, length, channels = kernel.operands[0].shape
    blocks = batch * length * channels / 640  # positions of as many channels as a block has
    # One program of a group of blocks runs the first loop, for columns.
    columns, *_ = kernel.step.inner
    others = 1 - 1 / kernel.params["grid_mapping"].grid[-1]
    cycles = kernel.cycles - kernel.programs * others * columns.trips * columns.cycles
    return {
        "compiled": "yes",
        "VMEM MiB": kernel.vmem / 2**20,
        "of limit": kernel.vmem / kernel.limit,
        "spilled": kernel.spilled,
        "cycles a position": cycles / blocks,
        "HBM MB": kernel.moved / 1e6,
        "HBM vs minimum": kernel.moved / min_bytes(kernel.jaxpr),
        "1e6 exp": taken / 1e6,
        "exponentials vs minimum": taken / min_exponentials(length, batch),
    }


def vmem_allocations(file: Path) -> tuple[int, int]:
    """Bytes of VMEM that a dumped kernel has, and those among them for spilled registers."""
    pattern = r"space=vmem, size = (0x[0-9a-f]+), scoped, tag = '([^']*)'"
    sizes = [(int(size, 16), tag) for size, tag in re.findall(pattern, file.read_text())]
    total = sum(size for size, _ in sizes)
    return total, sum(size for size, tag in sizes if tag.startswith("spilled"))
