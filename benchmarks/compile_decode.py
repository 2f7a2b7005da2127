"""Compiles prefill and decode ahead of time, no device needed: do they fit, and how many HBM bytes
does a decoded token take?

python benchmarks/compile_decode.py [--target v5e v6e h100] [--batch 128] [--json FILE]

The programs are the engine's own, for Hymba-1.5B. Arguments, temporaries and what is donated are
the compiler's account. `total` is what is held while the program runs: arguments, temporaries, its
code and outputs that are not donated arguments. Where that does not fit, the largest batch that
does is found, in steps of `STEP`, and has a row too.

Bytes per step are counted in the optimized HLO of the loop's body (`hymba_jax/aot/traffic.py`);
branches (sampling's filters) are left out. `minimum` is every parameter, key, value and state read
once, and every state written once; layers that reuse keys and values must read them again.

Kernels are those that a GPU starts in a step, without those of branches. Copies are those of arrays
of a cache's shape, into another layout or another place in HBM, in a step and around the loop,
which samples up to 16 tokens.
"""

import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

# Before JAX starts: the accelerators' compilers are wanted, not the accelerators.
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import numpy as np
import tyro
from _report import Row, report, write_json
from compile_scan import TPUS, Target, installed
from jax.sharding import Mesh

from hymba_jax.aot.fit import compiled_memory, refused_memory
from hymba_jax.aot.hlo import Instruction, Program
from hymba_jax.aot.programs import InferencePrograms, TracedProgram
from hymba_jax.aot.topology import CHIPS, parse_topology
from hymba_jax.aot.traffic import hbm_bytes, launches
from hymba_jax.config import PRESETS, CacheFormat, DType, WeightFormat
from hymba_jax.parallel.mesh import bytes_per_device

STEP = 8  # granularity of the search for the largest batch


@dataclass(frozen=True)
class Options:
    """What to compile for, by default all whose packages are installed, and sizes.

    Attributes:
      batch, context: of decoding.
      prompts, prompt: how many are prefilled at once, and tokens of each; no prompts, no such row.
      weights, kv_cache: formats, as of `hymba generate`.
      search: where a batch does not fit, look for the largest that does.
    """

    target: tuple[Target, ...] = field(default_factory=installed)
    batch: int = 128
    context: int = 8192
    prompts: int = 8
    prompt: int = 1024
    dtype: DType = "bfloat16"
    state_dtype: tuple[DType, ...] = ("bfloat16", "float32")
    weights: WeightFormat = "float"
    kv_cache: CacheFormat = "float"
    search: bool = True
    json: Path | None = None


def main(options: Options) -> None:
    # The CUDA plugin must be there before any other part of JAX starts.
    meshes = {target: _mesh(target) for target in sorted(options.target)}
    tables = {
        target: list(compile_all(target, meshes[target], options)) for target in options.target
    }
    for target, rows in tables.items():
        decode = [row for row in rows if row["program"] == "decode"]
        formats = f"{options.dtype}, weights {options.weights}, KV cache {options.kv_cache}"
        report(f"Hymba-1.5B compiled for {target}, {formats}: memory, GB", _memory(rows))
        report(f"HBM traffic per decoding step on {target}, GB", _traffic(decode))
    if options.json is not None:
        write_json([row for rows in tables.values() for row in rows], options.json)


def compile_all(target: Target, mesh: Mesh, options: Options) -> Iterator[Row]:
    """A row for each state dtype and program, and for the largest batch where one does not fit."""
    for state_dtype in options.state_dtype:
        programs = InferencePrograms(
            PRESETS["hymba-1.5b"],
            mesh,
            options.dtype,
            state_dtype,
            weights=options.weights,
            kv_cache=options.kv_cache,
        )
        about: Row = {"target": target, "state dtype": state_dtype}

        def decode(batch: int, programs: InferencePrograms = programs, about: Row = about) -> Row:
            sizes: Row = {"program": "decode", "batch": batch, "tokens": options.context}
            trace = partial(programs.decode, batch, options.context)
            return about | sizes | _row(target, mesh, trace)

        row = decode(options.batch)
        yield row
        if options.search and row["fits"] == "no":
            yield from _largest(decode, options.batch)
        if options.prompts:
            sizes: Row = {"program": "prefill", "batch": options.prompts, "tokens": options.prompt}
            trace = partial(programs.prefill, options.prompts, options.prompt)
            yield about | sizes | _row(target, mesh, trace)


def _largest(decode: Callable[[int], Row], batch: int) -> Iterator[Row]:
    """The row of the largest batch below that fits, if one does."""
    low, high, best = 0, math.ceil(batch / STEP), None
    while high - low > 1:
        middle = (low + high) // 2
        row = decode(middle * STEP)
        if row["fits"] == "yes":
            low, best = middle, row
        else:
            high = middle
    if best is not None:
        yield best


def _mesh(target: Target) -> Mesh:
    """One chip."""
    devices = parse_topology(TPUS.get(target, f"{target}:1")).devices()
    return Mesh(np.array(devices[:1]), ("chip",))


def _row(target: Target, mesh: Mesh, trace: Callable[[], TracedProgram]) -> Row:
    traced = trace()
    with jax.set_mesh(mesh):
        lowered = traced.program.lower()
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:  # reported as a row
            refused = refused_memory(error, bytes_per_device(traced.arguments))
            if refused is None:
                raise
            return {"fits": "no", "total": refused.total / 1e9}
    memory = compiled_memory(compiled)
    program = Program(compiled.as_text())
    shapes = {tuple(sorted(leaf.shape)) for leaf in jax.tree.leaves(traced.cache)}
    body = program.largest_loop()  # over tokens, as it carries the cache; sampling's carry less
    copies = _copies(program, body, shapes)
    copies_around = _copies(program, program.computations[program.entry], shapes)
    return {
        "fits": "yes" if memory.total < CHIPS[target].memory else "no",
        "total": memory.total / 1e9,
        "arguments": memory.arguments / 1e9,
        "donated": compiled.memory_analysis().alias_size_in_bytes / 1e9,
        "temporaries": memory.temporaries / 1e9,
        "HBM GB per step": sum(hbm_bytes(program, line) for line in body) / 1e9,
        "minimum": (bytes_per_device(traced.read) + bytes_per_device(traced.written)) / 1e9,
        "kernels": launches(program, body) if target == "h100" else "",
        "copies": len(copies),
        "copied": sum(copies) / 1e9,
        "copies around": len(copies_around),
        "copied around": sum(copies_around) / 1e9,
    }


def _memory(rows: Sequence[Row]) -> list[Row]:
    names = ("program", "state dtype", "batch", "tokens", "fits", "total")
    more = ("arguments", "donated", "temporaries", "copies around", "copied around")
    return [
        {name: row[name] for name in names} | {name: row.get(name, "") for name in more}
        for row in rows
    ]


def _traffic(rows: Sequence[Row]) -> list[Row]:
    names = (
        "state dtype",
        "batch",
        "tokens",
        "fits",
        "HBM GB per step",
        "minimum",
        "kernels",
        "copies",
        "copied",
    )
    return [{name: row.get(name, "") for name in names} for row in rows]


def _copies(
    program: Program, lines: Sequence[Instruction], shapes: set[tuple[int, ...]]
) -> list[int]:
    """Bytes of the arrays of these shapes, in any order of axes, that are copied in HBM."""
    return [
        line.results[0].size
        for line in lines
        if _is_copy(program, line)
        and tuple(sorted(line.results[0].shape)) in shapes
        and all(a.in_hbm for a in (line.results[0], program.arrays[line.operands[0]][0]))
    ]


def _is_copy(program: Program, line: Instruction) -> bool:
    if line.op != "fusion":
        return line.op in ("copy", "transpose", "copy-start")
    inner = program.computations[line.called]
    return {i.op for i in inner} <= {"parameter", "copy", "transpose", "bitcast", "reshape"}


if __name__ == "__main__":
    main(tyro.cli(Options))
