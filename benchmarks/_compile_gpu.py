"""Compiles the selective scan for an H100 on a machine without one, and says what it will cost.

Registers and spills are ptxas's. Bytes and exponentials are counted in the kernel's jaxpr: copies
between global and shared memory, loads and stores of global memory, and the kernel's inputs and
outputs once more where XLA reorders them. A copy for all blocks of a cluster counts once.
"""

import math
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import jax
from _report import Row
from _scan_passes import (
    compile_scans,
    equations,
    exponentials,
    min_bytes,
    min_exponentials,
    size,
)
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from hymba_jax.aot.topology import H100

SCHEDULERS = 132 * 4  # a warp for each is a full wave


def compile_for_gpu(
    lengths: Sequence[int], batches: Sequence[int], dtypes: Sequence[str]
) -> list[Row]:
    """A row for each size and pass: inference, the forward pass of training, the backward pass."""
    import_module("jax_plugins.xla_cuda13")  # before JAX looks for devices
    os.environ["MOSAIC_GPU_DUMP_PTXAS"] = "1"
    topology = topologies.get_topology_desc(platform="cuda", target_config=H100, topology="1x1x1")
    compile_pass = partial(_compile, topology.devices[0])
    return compile_scans(compile_pass, "h100", "pallas_gpu", lengths, batches, dtypes)


def _compile(device: jax.Device, function: Callable[..., Any], inputs: Any) -> Row:
    traced = jax.jit(function, in_shardings=SingleDeviceSharding(device)).trace(*inputs)
    lowered = traced.lower(lowering_platforms=("cuda",))
    try:
        with captured() as log:
            lowered.compile()
    except Exception as error:  # reported as a row
        return {"compiled": str(error).splitlines()[0][:60]}
    ((registers, spilled),) = registers_and_spills(log[0]).values()

    jaxpr = traced.jaxpr.jaxpr
    (kernel,) = (e for e, _ in equations(jaxpr) if e.primitive.name == "mpmd_map")
    (mesh,) = kernel.params["meshes"]
    blocks = math.prod((*mesh.grid, *mesh.cluster))
    (body,) = kernel.params["jaxprs"]
    in_kernel = list(equations(body))
    around = sum(
        size(v.aval)
        for e, _ in equations(jaxpr)
        if e.primitive.name in ("transpose", "broadcast_in_dim", "reduce_sum")
        for v in (*e.invars, *e.outvars)
    )
    moved = around + blocks * sum(_hbm_bytes(e, mesh) * times for e, times in in_kernel)
    taken = blocks * exponentials(body)
    batch, length, _ = traced.jaxpr.jaxpr.invars[0].aval.shape
    return {
        "compiled": "yes",
        "registers": registers,
        "spilled": spilled,
        "shared KiB": shared_bytes(kernel) / 2**10,
        "waves": 4 * blocks / SCHEDULERS,
        "HBM MB": moved / 1e6,
        "HBM vs minimum": moved / min_bytes(jaxpr),
        "1e6 exp": taken / 1e6,
        "exponentials vs minimum": taken / min_exponentials(length, batch),
    }


def registers_and_spills(log: str) -> dict[str, tuple[int, int]]:
    """Of each kernel that was compiled, by name: registers, and bytes of spills, as ptxas says."""
    found = re.findall(
        r"entry function '(\w+)_mosaic_gpu_kernel'.*?(\d+) bytes spill stores, (\d+) bytes spill "
        r"loads.*?Used (\d+) registers",
        log,
        re.DOTALL,
    )
    return {name: (int(used), int(out) + int(back)) for name, out, back, used in found}


def shared_bytes(kernel: Any) -> int:
    """Shared memory of a kernel's blocks, from its jaxpr."""
    (body,) = kernel.params["jaxprs"]
    scope, *_ = (e for e, _ in equations(body) if e.primitive.name == "run_scoped")
    scratch = scope.params["jaxpr"].invars
    return kernel.params["compiler_params"].reduction_scratch_bytes + sum(
        size(v.aval) for v in scratch if hasattr(v.aval.dtype, "itemsize")
    )


def _hbm_bytes(equation: Any, mesh: Any) -> float:
    """Bytes that an equation moves between HBM and a block."""
    name, params = equation.primitive.name, equation.params
    if name.startswith("copy_") and any(v.aval.dtype == "int8" for v in equation.invars[:2]):
        # Of shared memory that is used in turn for several arrays: the scan's exchange within a
        # cluster, whose part of global memory is small, and stays in the L2 cache.
        return 0
    if name == "copy_gmem_to_smem":
        slots = equation.invars[1].aval
        extents = dict(zip(mesh.cluster_names, mesh.cluster, strict=True))
        among = math.prod(extents[axis] for axis in params["collective_axes"] or ())
        return size(slots) / slots.shape[0] / among
    if name == "copy_smem_to_gmem":
        slots = equation.invars[0].aval
        return size(slots) / (slots.shape[0] if slots.ndim > 2 else 1)
    if name in ("load", "get", "swap", "store") and "gmem" in str(equation.invars[0].aval):
        value = equation.outvars[0] if equation.outvars else equation.invars[1]
        return size(value.aval)
    return 0


@contextmanager
def captured() -> Iterator[list[str]]:
    """What the compiler prints past Python."""
    log: list[str] = []
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "log")
        kept = [os.dup(fd) for fd in (1, 2)]
        sys.stdout.flush()
        with path.open("wb") as file:
            for fd in (1, 2):
                os.dup2(file.fileno(), fd)
            try:
                yield log
            finally:
                for fd, copy in zip((1, 2), kept, strict=True):
                    os.dup2(copy, fd)
                    os.close(copy)
        log.append(path.read_text(errors="replace"))
