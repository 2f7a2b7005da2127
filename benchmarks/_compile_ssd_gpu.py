"""Compiles SSD for an H100 on a machine without one, and says what it will cost.

Registers and spills are ptxas's. Bytes of HBM are counted as `hymba compile` counts them: each
array that a kernel or another operation of the program reads or writes, once. The minimum is each
input and output of the pass, once.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib import import_module
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
from _compile_gpu import captured, registers_and_spills, shared_bytes
from _report import Row
from _scan_passes import equations, min_bytes
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from hymba_jax.aot.hlo import Program
from hymba_jax.aot.instructions import instruction_costs
from hymba_jax.aot.topology import CHIPS, H100
from hymba_jax.ops.ssd import ssd

HEADS, HEAD_DIM, GROUPS, STATE = 64, 64, 1, 128  # of configs/designs/1b_mamba2.toml


def compile_ssd_for_gpu(
    documents: Sequence[bool], lengths: Sequence[int], batches: Sequence[int]
) -> list[Row]:
    """A row for each pass and size: inference, and output and gradients together; and before it, a
    row for each of its kernels."""
    import_module("jax_plugins.xla_cuda13")  # before JAX looks for devices
    os.environ["MOSAIC_GPU_DUMP_PTXAS"] = "1"
    topology = topologies.get_topology_desc(platform="cuda", target_config=H100, topology="1x1x1")
    # A kernel is compiled once, whichever passes call it.
    known: dict[str, tuple[int, int]] = {}
    rows: list[Row] = []
    for length, batch, has_documents in product(lengths, batches, documents):
        sizes: Row = {"target": "h100", "length": length, "batch": batch}
        sizes["documents"] = str(has_documents)
        for name, (function, inputs) in _passes(length, batch, has_documents).items():
            row = sizes | {"pass": name}
            rows += [row | r for r in _compile(topology.devices[0], known, function, inputs)]
    return rows


def _passes(
    length: int, batch: int, has_documents: bool
) -> dict[str, tuple[Callable[..., Any], Sequence[Any]]]:
    sequence = partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
    of_heads = jax.ShapeDtypeStruct((HEADS,), jnp.float32)
    x, dt = sequence((batch, length, HEADS, HEAD_DIM)), sequence((batch, length, HEADS))
    B = sequence((batch, length, GROUPS, STATE))
    state = jax.ShapeDtypeStruct((batch, HEADS, HEAD_DIM, STATE), jnp.float32)
    ids = jax.ShapeDtypeStruct((batch, length), jnp.int32) if has_documents else None

    def forward(ids: Any, state: Any, *inputs: Any) -> Any:
        return ssd(*inputs, initial_state=state, segment_ids=ids, implementation="pallas_gpu")

    def training(dy: Any, ids: Any, *inputs: Any) -> Any:
        outputs, vjp = jax.vjp(partial(forward, ids), *inputs)
        return outputs, vjp((dy, jnp.zeros_like(outputs[1])))

    inputs = (state, x, dt, of_heads, B, B, of_heads, of_heads)
    return {"inference": (forward, (ids, *inputs)), "training": (training, (x, ids, *inputs))}


def _compile(
    device: jax.Device,
    known: dict[str, tuple[int, int]],
    function: Callable[..., Any],
    inputs: Sequence[Any],
) -> Iterator[Row]:
    traced = jax.jit(function, in_shardings=SingleDeviceSharding(device)).trace(*inputs)
    jaxpr = traced.jaxpr.jaxpr
    try:
        with captured() as log:
            compiled = traced.lower(lowering_platforms=("cuda",)).compile()
    except Exception as error:  # reported as a row
        yield {"compiled": str(error).splitlines()[0][:60]}
        return
    known |= registers_and_spills(log[0])
    kernels = [e for e, _ in equations(jaxpr) if e.primitive.name == "mpmd_map"]
    for kernel in kernels:
        registers, spilled = known[kernel.params["name"]]
        yield {
            "compiled": "yes",
            "kernel": kernel.params["name"],
            "registers": registers,
            "spilled": spilled,
            "shared KiB": shared_bytes(kernel) / 2**10,
            "HBM MB": kernel.params["cost_estimate"].bytes_accessed / 1e6,
            "GFLOP": kernel.params["cost_estimate"].flops / 1e9,
        }
    costs = instruction_costs(Program(compiled.as_text()), CHIPS["h100"])
    moved = sum(cost.hbm_bytes for cost in costs)
    yield {
        "compiled": "yes",
        "kernel": "all",
        "HBM MB": moved / 1e6,
        "HBM vs minimum": moved / min_bytes(jaxpr),
        "temporary MB": compiled.memory_analysis().temp_size_in_bytes / 1e6,
    }
