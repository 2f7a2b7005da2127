"""Compiles SSD for TPUs on a machine without one, and says what it will cost.

As `_compile_tpu.py` says of the selective scan, but HBM bytes are what the kernel states, relative
to each of its arrays once. Cycles are those of a position and a head, what runs only in a row's
first or last chunk included, beside what its matmuls take at the peak throughput of bfloat16, and
what HBM takes for those arrays.
"""

import tempfile
from collections.abc import Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from _compile_tpu import compile_kernel
from _report import Row
from _scan_passes import passes_of
from compile_scan import TPUS

from hymba_jax.aot.kernel_time import CLOCKS
from hymba_jax.aot.topology import CHIPS, without_a_tpu
from hymba_jax.ops.kernel_cost import array_bytes
from hymba_jax.ops.ssd import ssd

HEADS = {"300M": 24, "1B": 64}
"""Of a Mamba2 layer, twice as wide as the residual stream: 768 and 2048."""
HEAD_DIM, GROUPS, STATE = 64, 1, 128


def compile_ssd_for_tpus(
    targets: Sequence[str],
    models: Sequence[str],
    dtypes: Sequence[str],
    documents: Sequence[bool],
    lengths: Sequence[int],
    batches: Sequence[int],
) -> list[Row]:
    """A row for each pass and size."""
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as dump:
        without_a_tpu(f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true")
        for sizes in product(targets, models, dtypes, documents, lengths, batches):
            rows += ssd_rows(Path(dump), *sizes)
    return rows


def ssd_rows(
    dump: Path, target: str, model: str, dtype: str, documents: bool, length: int, batch: int
) -> list[Row]:
    """One for each pass."""
    heads = HEADS[model]
    x, dt, B = (
        jax.ShapeDtypeStruct((batch, length, *shape), dtype)
        for shape in ((heads * HEAD_DIM,), (heads,), (GROUPS, STATE))
    )
    of_heads = jax.ShapeDtypeStruct((heads,), jnp.float32)
    state = jax.ShapeDtypeStruct((batch, heads, HEAD_DIM, STATE), jnp.float32)
    inputs = (x, dt, of_heads, B, B, of_heads, of_heads, state)
    segment_ids = jnp.zeros((batch, length), jnp.int32) if documents else None
    rows: list[Row] = []
    for name, (function, arrays) in passes_of(partial(scan, segment_ids), inputs).items():
        row: Row = {"target": target, "model": model, "dtype": dtype, "documents": str(documents)}
        row |= {"length": length, "batch": batch, "pass": name}
        positions = batch * length * heads
        rows.append(row | compile_pass(dump, target, positions, function, arrays))
    return rows


def scan(segment_ids: Any, *inputs: Any) -> Any:
    """x and y have all channels innermost, as they come from and go to projections."""
    x, *of_positions, initial_state = inputs
    heads = of_positions[0].shape[2]
    y, state = ssd(
        x.reshape(*x.shape[:2], heads, HEAD_DIM),
        *of_positions,
        initial_state=initial_state,
        segment_ids=segment_ids,
        implementation="pallas_tpu",
    )
    return y.reshape(x.shape), state


def compile_pass(dump: Path, target: str, positions: int, function: Any, arrays: Any) -> Row:
    try:
        kernel = compile_kernel("ssd_", TPUS[target], dump, function, arrays)
    except Exception as error:  # reported as a row
        return {"compiled": str(error).splitlines()[0][:60]}
    chip, cost = CHIPS[target], kernel.params["cost_estimate"]
    clock, once = CLOCKS[chip.kind] / positions, array_bytes(kernel.operands, kernel.results)
    return {
        "compiled": "yes",
        "VMEM MiB": kernel.vmem / 2**20,
        "of limit": kernel.vmem / kernel.limit,
        "spilled": kernel.spilled,
        "HBM MB": cost.bytes_accessed / 1e6,
        "HBM vs minimum": cost.bytes_accessed / once,
        "cycles": kernel.cycles / positions,
        "matmuls' cycles": cost.flops / chip.peak_flops * clock,
        "HBM's cycles": once / chip.bandwidth * clock,
        "per 1024 exp": kernel.cycles / cost.transcendentals * 1024,
    }
