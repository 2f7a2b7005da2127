"""Compiles the selective scan for TPUs on a machine without one, and says what it will cost there.

VMEM and spills are the compiler's, from the allocations that it dumps, and so are cycles, those of
a position and 640 channels, from its schedules. Bytes are XLA's count, in which the kernel has what
it states: a block whenever its index changes. Exponentials, with all that a TPU has the same slot
for, are counted in the kernel's jaxpr.
"""

import math
import re
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
from _bundles import grid_loop
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

from hymba_jax.aot.topology import without_a_tpu


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
            rows += compile_scans(compile_pass, target, "pallas_tpu", lengths, batches, dtypes)
        return rows


def _compile(target: str, dump: Path, function: Callable[..., Any], inputs: Any) -> Row:
    chip = topologies.get_topology_desc(platform="tpu", topology_name=target).devices[:1]
    sharding = NamedSharding(Mesh(chip, ("chip",)), PartitionSpec())
    before = set(dump.iterdir())
    traced = jax.jit(function, in_shardings=sharding).trace(*inputs)
    try:
        compiled = traced.lower(lowering_platforms=("tpu",)).compile()
    except Exception as error:  # reported as a row
        return {"compiled": str(error).splitlines()[0][:60]}
    dumped = set(dump.iterdir()) - before
    (file,) = (f for f in dumped if re.search(r"selective_scan.*-\d+-post-ra\.txt", f.name))
    vmem, spilled = vmem_allocations(file)
    (schedule,) = (
        f for f in dumped if re.search(r"selective_scan.*-\d+-final_bundles\.txt", f.name)
    )
    cycles = grid_loop(schedule).cycles

    jaxpr = traced.jaxpr.jaxpr
    (kernel,) = (e for e, _ in equations(jaxpr) if e.primitive.name == "pallas_call")
    grid_mapping = kernel.params["grid_mapping"]
    costs: Any = compiled.cost_analysis()
    moved = costs["bytes accessed"]

    taken = math.prod(grid_mapping.grid) * exponentials(kernel.params["jaxpr"])
    batch, length, channels = kernel.invars[0].aval.shape
    blocks = batch * length * channels / 640  # positions of as many channels as a block has
    return {
        "compiled": "yes",
        "VMEM MiB": vmem / 2**20,
        "of limit": vmem / kernel.params["compiler_params"].vmem_limit_bytes,
        "spilled": spilled,
        "cycles a position": cycles * math.prod(grid_mapping.grid) / blocks,
        "HBM MB": moved / 1e6,
        "HBM vs minimum": moved / min_bytes(jaxpr),
        "1e6 exp": taken / 1e6,
        "exponentials vs minimum": taken / min_exponentials(length, batch),
    }


def vmem_allocations(file: Path) -> tuple[int, int]:
    """Bytes of VMEM that a dumped kernel has, and those among them for spilled registers."""
    pattern = r"space=vmem, size = (0x[0-9a-f]+), scoped, tag = '([^']*)'"
    sizes = [(int(size, 16), tag) for size, tag in re.findall(pattern, file.read_text())]
    total = sum(size for size, _ in sizes)
    return total, sum(size for size, tag in sizes if tag.startswith("spilled"))
