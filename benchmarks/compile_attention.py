"""Compiles attention ahead of time, no device needed.

python benchmarks/compile_attention.py [--target v5e v6e h100] [--json FILE]

Beside the scores that it does without, were they float32: XLA's temporaries in HBM. For TPUs: the
most VMEM that one of the kernels has, and spills, as they do with a whole block of scores; the
cycles of the kernels, from their final schedules and the blocks that the mask shows, without stalls
for memory. For an H100: the most registers and shared memory that one of our kernels has, and
spills; and what XLA will ask of cuDNN, which chooses kernels and workspace on the machine itself.
"""

import os
import re
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from importlib import import_module
from itertools import product
from pathlib import Path
from typing import Any, Literal

# Before JAX starts: the accelerators' compilers are wanted, not the accelerators.
os.environ |= {"JAX_PLATFORMS": "cpu", "MOSAIC_GPU_DUMP_PTXAS": "1"}

import jax
import tyro
from _bundles import Loop, grid_loop
from _compile_gpu import captured, registers_and_spills, shared_bytes
from _compile_tpu import vmem_allocations
from _report import Row, report, write_json
from _scan_passes import equations
from compile_scan import TPUS, Target, installed
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from hymba_jax.aot.hlo import Program
from hymba_jax.aot.instructions import instruction_costs
from hymba_jax.aot.topology import CHIPS, H100, without_a_tpu
from hymba_jax.ops.attention import pallas_tpu as on_tpu
from hymba_jax.ops.attention.cudnn import cudnn
from hymba_jax.ops.attention.pallas_gpu import pallas_gpu
from hymba_jax.ops.kernel_cost import visited_blocks

HEAD_DIM, VALUE_DIM, WINDOW, META_TOKENS = 64, 128, 1024, 128
HEADS = {"125M": (8, 4), "1.5B": (25, 5)}


@dataclass(frozen=True)
class Options:
    """What to compile for, by default all whose packages are installed, and sizes."""

    target: tuple[Target, ...] = field(default_factory=installed)
    model: tuple[Literal["125M", "1.5B"], ...] = ("125M", "1.5B")
    dtype: tuple[Literal["bfloat16", "float32"], ...] = ("bfloat16", "float32")
    length: tuple[int, ...] = (2048, 8192)
    """Besides the meta tokens."""
    batch: tuple[int, ...] = (1,)
    json: Path | None = None


def main(options: Options) -> None:
    tables: dict[str, list[Row]] = {}
    if "h100" in options.target:
        # The CUDA plugin must be there before any other part of JAX starts.
        import_module("jax_plugins.xla_cuda13")
        topology = topologies.get_topology_desc(
            platform="cuda", target_config=H100, topology="1x1x1"
        )
        # Neither has attention in float32.
        bfloat16 = replace(options, dtype=("bfloat16",))
        for name, attention, compile_pass in (
            ("h100", pallas_gpu, partial(compile_for_gpu, {})),
            ("h100, cuDNN", cudnn, compile_cudnn),
        ):
            tables[name] = list(rows(name, attention, partial(compile_pass, topology), bfloat16))
    with tempfile.TemporaryDirectory() as dump:
        without_a_tpu(f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true")
        for target in options.target:
            if target in TPUS:
                topology = topologies.get_topology_desc(TPUS[target], platform="tpu")
                compile_pass = partial(compile_for_tpu, topology, Path(dump))
                tables[target] = list(rows(target, on_tpu.pallas_tpu, compile_pass, options))
    for name, table in tables.items():
        report(f"attention compiled for {name}, window {WINDOW}", table)
    if options.json is not None:
        write_json([row for table in tables.values() for row in table], options.json)


def rows(
    target: str,
    attention: Callable[..., jax.Array],
    compile_pass: Callable[..., dict[str, Any]],
    options: Options,
) -> Iterator[Row]:
    """One for each size and pass: the forward pass, and output and gradients together."""
    for model, dtype, length, batch, layer in product(
        options.model, options.dtype, options.length, options.batch, ("window", "global")
    ):
        heads, kv_heads = HEADS[model]
        inputs = [
            jax.ShapeDtypeStruct((batch, positions, n, width), dtype)
            for positions, n, width in (
                (length, heads, HEAD_DIM),
                (META_TOKENS + length, kv_heads, HEAD_DIM),
                (META_TOKENS + length, kv_heads, VALUE_DIM),
            )
        ]
        forward = partial(
            attention,
            window=WINDOW if layer == "window" else None,
            num_meta_tokens=META_TOKENS,
        )

        def training(
            *inputs: jax.Array, forward: Callable[..., jax.Array] = forward
        ) -> tuple[jax.Array, ...]:
            output, vjp = jax.vjp(forward, *inputs)
            return output, *vjp(output)

        for name, function in (("forward", forward), ("training", training)):
            row: Row = {
                "target": target,
                "model": model,
                "dtype": dtype,
                "length": length,
                "batch": batch,
                "layer": layer,
                "pass": name,
                "scores MB": batch * heads * length * (META_TOKENS + length) * 4 / 1e6,
            }
            compiled: dict[str, Any] = compile_pass(function, inputs)
            for kernel, loop in compiled.pop("loops", {}).items():
                cycles, scores = kernel_cycles(loop, length, layer)
                compiled[f"1e6 cycles {kernel}"] = batch * kv_heads * cycles / 1e6
                of_head = scores * heads // kv_heads
                compiled[f"per 1024 scores {kernel}"] = cycles / of_head * 1024
            row |= compiled
            yield row


def compile_for_gpu(
    known: dict[str, tuple[int, int]], topology: Any, function: Callable[..., Any], inputs: Any
) -> Row:
    """`known` gets registers and spills: a kernel is compiled once, whichever passes call it."""
    traced = jax.jit(function).trace(*inputs).jaxpr.jaxpr
    kernels = [e for e, _ in equations(traced) if e.primitive.name == "mpmd_map"]
    try:
        with captured() as log:
            compiled = _compile(topology, "cuda", function, inputs)
    except Exception as error:  # reported as a row
        return {"compiled": str(error).splitlines()[0][:40]}
    known |= registers_and_spills(log[0])
    registers, spilled = zip(*(known[kernel.params["name"]] for kernel in kernels), strict=True)
    return {
        "compiled": "yes",
        "temporary MB": compiled.memory_analysis().temp_size_in_bytes / 1e6,
        "HBM MB": _hbm_megabytes(compiled),
        "kernels": len(kernels),
        "registers": max(registers),
        "spilled": sum(spilled),
        "shared KiB": max(map(shared_bytes, kernels)) / 2**10,
    }


def compile_cudnn(topology: Any, function: Callable[..., Any], inputs: Any) -> Row:
    try:
        compiled = _compile(topology, "cuda", function, inputs)
    except Exception as error:  # reported as a row
        return {"compiled": str(error).splitlines()[0][:40]}
    calls = re.findall(
        r'__cudnn\$fmha(\w*)Softmax(?:Backward)?".*"mask_type": "(\w+)"', compiled.as_text()
    )
    return {
        "compiled": "yes",
        "temporary MB": compiled.memory_analysis().temp_size_in_bytes / 1e6,
        "HBM MB": _hbm_megabytes(compiled),
        "causal calls": calls.count(("", "CAUSAL")),
        "masked calls": calls.count(("ScaleBias", "NO_MASK")),
    }


def compile_for_tpu(
    topology: Any, dump: Path, function: Callable[..., Any], inputs: Any
) -> dict[str, Any]:
    try:
        compiled = _compile(topology, "tpu", function, inputs)
    except Exception as error:  # reported as a row
        return {"compiled": str(error).splitlines()[0][:40]}
    kernels = dumped(dump, "post-ra")
    allocations = [vmem_allocations(file) for file in kernels]
    loops = {
        name: grid_loop(file)
        for file in dumped(dump, "final_bundles")
        for name in ("forward", "backward")
        if name in file.name
    }
    for file in dump.iterdir():
        file.unlink()
    return {
        "compiled": "yes",
        "temporary MB": compiled.memory_analysis().temp_size_in_bytes / 1e6,
        "kernels": len(kernels),
        "VMEM MiB": max(total for total, _ in allocations) / 2**20,
        "spilled MiB": max(spilled for _, spilled in allocations) / 2**20,
        "loops": loops,
    }


def dumped(dump: Path, stage: str) -> list[Path]:
    """The kernels after a stage of the compiler."""
    name = rf"attention_\w+[.\d]*-\d+-{stage}\.txt"
    return [f for f in dump.iterdir() if re.search(name, f.name)]


def kernel_cycles(loop: Loop, length: int, layer: str) -> tuple[int, int]:
    """Of a kernel for one row and key/value head, and the scores of one of its query heads.

    Its loops are over tiles of keys at the first and the last block of queries, and over the blocks
    of keys that a block of queries sees.
    """
    block, window = on_tpu._BLOCK, WINDOW if layer == "window" else None
    visits = visited_blocks(0, length, length, window, block, block)
    first, each, *last = (inner.cycles for inner in loop.inner)
    cycles = length // block * loop.own + visits * each
    cycles += (META_TOKENS + length) // 128 * (first + sum(last))
    return cycles, length * META_TOKENS + visits * block**2


def _hbm_megabytes(compiled: Any) -> float:
    """As `hymba compile` counts: each array that an operation reads or writes, once."""
    costs = instruction_costs(Program(compiled.as_text()), CHIPS["h100"])
    return sum(cost.hbm_bytes for cost in costs) / 1e6


def _compile(topology: Any, platform: str, function: Callable[..., Any], inputs: Any) -> Any:
    sharding = SingleDeviceSharding(topology.devices[0])
    traced = jax.jit(function, in_shardings=sharding).trace(*inputs)
    return traced.lower(lowering_platforms=(platform,)).compile()


if __name__ == "__main__":
    main(tyro.cli(Options))
