"""Compiles reading and continuing texts for accelerators that need not be there: do they fit, and
what does a decoded token move?

python benchmarks/compile_decode.py [--target v5e v6e h100] [--batch 128] [--json FILE]

The programs are the engine's own, for Hymba-1.5B. Arguments, temporaries and what is donated are
the compiler's account. `total` is what is held while the program runs: arguments, temporaries, its
code and outputs that are not donated arguments. Where that does not fit, the largest batch that
does is found, in steps of `STEP`, and has a row too.

Bytes a step are counted in the optimized HLO of the loop's body, as the accelerators' compilers
leave them: what each instruction reads from and writes to HBM, padding of tiles included, TPUs'
other memories not. A slice or gather reads its result, an update in place moves the update twice,
a fusion reads of each operand what its instructions read. Branches (sampling's filters) are left
out. `least` is every parameter, key, value and state read once, and every state written once;
layers that reuse keys and values must read them again.

Copies are those of arrays of a cache's shape, into another layout or another place in HBM, in a
step and around the loop, which draws up to 16 tokens.
"""

import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

# Before JAX starts: the accelerators' compilers are wanted, not the accelerators.
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from _compile_gpu import H100
from _compile_tpu import without_a_tpu
from _report import Row, report, write_json
from compile_scan import TPUS, Target, installed
from flax import nnx
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from hymba_jax.config import PRESETS, ComputeConfig, DType
from hymba_jax.inference.engine import Columns, DecodeState, Engine, Limits
from hymba_jax.inference.sampling import SamplingConfig, make_sampler
from hymba_jax.model import Hymba
from hymba_jax.model.cache import Cache

MEMORY_GB = {"h100": 80, "v5e": 16, "v6e": 32}
STEP = 8  # batches between which the largest is looked for


@dataclass(frozen=True)
class Options:
    """What to compile for, by default all whose packages are installed, and sizes.

    Attributes:
      batch, context: of decoding.
      prompts, prompt: texts that are read at once, and tokens of each; no prompts, no such row.
      search: where a batch does not fit, look for the largest that does.
    """

    target: tuple[Target, ...] = field(default_factory=installed)
    batch: int = 128
    context: int = 8192
    prompts: int = 8
    prompt: int = 1024
    dtype: DType = "bfloat16"
    state_dtype: tuple[DType, ...] = ("bfloat16", "float32")
    search: bool = True
    json: Path | None = None


def main(options: Options) -> None:
    if "h100" in options.target:
        import_module("jax_plugins.xla_cuda13")  # before JAX looks for devices
    without_a_tpu()
    tables = {target: list(compile_all(target, options)) for target in options.target}
    for target, rows in tables.items():
        decode = [row for row in rows if row["program"] == "decode"]
        report(f"Hymba-1.5B compiled for {target}, {options.dtype}: memory, GB", _memory(rows))
        report(f"what a decoded token moves on {target}, GB", _traffic(decode))
    if options.json is not None:
        write_json([row for rows in tables.values() for row in rows], options.json)


def compile_all(target: Target, options: Options) -> Iterator[Row]:
    """A row for each state dtype and program, and for the largest batch where one does not fit."""
    mesh = _mesh(target)
    for state_dtype in options.state_dtype:
        programs = _Programs(mesh, options.dtype, state_dtype)
        about: Row = {"target": target, "state dtype": state_dtype}

        def decode(batch: int, programs: _Programs = programs, about: Row = about) -> Row:
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
    if target in TPUS:
        topology = topologies.get_topology_desc(TPUS[target], platform="tpu")
    else:
        topology = topologies.get_topology_desc(
            platform="cuda", target_config=H100, topology="1x1x1"
        )
    return Mesh(np.array(topology.devices[:1]), ("chip",))


class _Traced(NamedTuple):
    """A program, and the arrays that it should read once and write once."""

    program: Any
    read: Any
    written: Any
    cache: Any


class _Programs:
    """The engine's programs, traced for shapes on a chip."""

    def __init__(self, mesh: Mesh, dtype: DType, state_dtype: DType):
        self.sharding = NamedSharding(mesh, PartitionSpec())
        compute = ComputeConfig(dtype=dtype, param_dtype=dtype, scan_layers=False)
        engines: list[Engine] = []

        def make_params() -> Any:
            model = Hymba(PRESETS["hymba-1.5b"], compute, nnx.Rngs(0))
            engines.append(Engine(model, state_dtype=state_dtype))
            return engines[0].params

        self.params = self.shapes(make_params)  # nothing is computed
        self.programs = engines[0]._programs
        self.prefix = self.shapes(self.programs.prefix, self.params)

    def decode(self, batch: int, context: int) -> _Traced:
        """Continuing `batch` texts, each with a cache of `context` tokens."""
        start = partial(self.programs.start, batch=batch, context=context)
        limits = self.shapes(
            lambda: Limits(jnp.zeros(batch, jnp.int32), jnp.zeros((batch, 4), jnp.int32))
        )
        sampler = self.shapes(lambda: make_sampler([SamplingConfig()] * batch, range(batch)))
        state = self.shapes(partial(_decode_state, batch), self.shapes(start, self.prefix).cache)
        steps = self.shapes(lambda: jnp.int32(0))
        program = self.programs.decode.trace(  # type: ignore[attr-defined]
            self.params, self.prefix, state, sampler, limits, steps
        )
        layers = state.cache.layers
        states = [layer.ssm for layer in layers]
        return _Traced(program, (self.params, self.prefix, layers), states, layers)

    def prefill(self, batch: int, length: int) -> _Traced:
        """Reading `batch` texts of `length` tokens from their start."""
        start = partial(self.programs.start, batch=batch, context=length)
        state = self.shapes(start, self.prefix)
        piece = self.shapes(
            lambda: Columns(jnp.zeros((batch, length), jnp.int32), jnp.zeros(batch, jnp.int32))
        )
        program = self.programs.read.trace(  # type: ignore[attr-defined]
            self.params, self.prefix, state, piece, is_start=True
        )
        layers = state.cache.layers
        return _Traced(program, (self.params, self.prefix), layers, layers)

    def shapes(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return self.place(jax.eval_shape(function, *arguments))

    def place(self, tree: Any) -> Any:
        return jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=self.sharding), tree
        )


def _decode_state(batch: int, cache: Cache) -> DecodeState:
    zeros, seen = jnp.zeros(batch, jnp.int32), (batch, PRESETS["hymba-1.5b"].vocab_size)
    return DecodeState(cache, zeros, zeros, zeros == 1, jnp.zeros(seen, bool))


def _row(target: Target, mesh: Mesh, trace: Callable[[], _Traced]) -> Row:
    with jax.set_mesh(mesh):
        traced = trace()
        platform = "tpu" if target in TPUS else "cuda"
        lowered = traced.program.lower(lowering_platforms=(platform,))
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:  # a row of the report
            needs = re.search(r"memory required[^(]*\(([\d.]+)G\)", str(error))
            if needs is None:
                raise
            return {"fits": "no", "total": float(needs[1]) * 2**30 / 1e9}
    memory: Any = compiled.memory_analysis()
    total = (
        memory.argument_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.generated_code_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
    )
    program = _Program(compiled.as_text())
    shapes = {tuple(sorted(leaf.shape)) for leaf in jax.tree.leaves(traced.cache)}
    step, around = program.loop_body, program.entry
    copies = program.copies(step, shapes) if step else []
    copies_around = program.copies(around, shapes)
    return {
        "fits": "yes" if total < MEMORY_GB[target] * 1e9 else "no",
        "total": total / 1e9,
        "arguments": memory.argument_size_in_bytes / 1e9,
        "donated": memory.alias_size_in_bytes / 1e9,
        "temporaries": memory.temp_size_in_bytes / 1e9,
        "a step": sum(map(program.moved, program.computations[step])) / 1e9 if step else 0.0,
        "least": (_bytes(traced.read) + _bytes(traced.written)) / 1e9,
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
    names = ("state dtype", "batch", "tokens", "fits", "a step", "least", "copies", "copied")
    return [{name: row.get(name, "") for name in names} for row in rows]


def _bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


class _Array(NamedTuple):
    """An array of an HLO program.

    Attributes:
      size: bytes, as its tiles are padded.
      in_hbm: not in another of a TPU's memories.
    """

    shape: tuple[int, ...]
    size: int
    in_hbm: bool

    @property
    def in_hbm_size(self) -> int:
        return self.size if self.in_hbm else 0


class _Instruction(NamedTuple):
    name: str
    results: list[_Array]
    op: str
    operands: list[str]
    called: str


# Neither reads nor writes: names for arrays, the ends of what was started, and branches.
_FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "opt-barrier"),
    *("after-all", "while", "conditional", "iota", "partition-id"),
}
_SLICES = {"slice", "dynamic-slice", "gather"}
_UPDATES = {"dynamic-update-slice": 1, "scatter": 2}  # which operand is the update
_MOVES = {"copy", "transpose", "copy-start"}


class _Program:
    """An optimized HLO program, as text."""

    def __init__(self, text: str):
        self.computations: dict[str, list[_Instruction]] = {}
        self.entry = ""
        lines: list[_Instruction] = []
        text = re.sub(r"/\*.*?\*/", "", text)  # comments number the parts of tuples
        for line in text.splitlines():
            if start := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
                lines = self.computations[start[2]] = []
                self.entry = start[2] if start[1] else self.entry
            elif found := re.match(
                r"\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*?)\)(.*)", line
            ):
                name, results, op, operands, rest = found.groups()
                called = re.search(r"calls=%?([\w.\-]+)", rest)
                names = [word.split()[-1].lstrip("%") for word in operands.split(", ") if word]
                lines.append(
                    _Instruction(name, _arrays(results), op, names, called[1] if called else "")
                )
        self.arrays = {
            line.name: line.results for lines in self.computations.values() for line in lines
        }
        loops = re.findall(r"%?([\w.\-]+) = .* while\(.*body=%?([\w.\-]+)", text)
        # The loop over tokens carries the cache; those that sampling has carry less.
        self.loop_body = max(
            loops, key=lambda loop: sum(a.size for a in self.arrays[loop[0]]), default=("", "")
        )[1]

    def moved(self, line: _Instruction) -> int:
        """Bytes that an instruction outside of fusions reads from and writes to HBM."""
        if line.op in _FREE or line.op.endswith("-done"):
            return 0
        if line.op in ("copy-start", "slice-start"):
            one, other = line.results[:2]  # one of them is where the other one goes
            return (one.in_hbm + other.in_hbm) * min(one.size, other.size)
        inputs = [array for name in line.operands for array in self.arrays[name]]
        if line.op == "custom-call" and not any(a.in_hbm for a in (*inputs, *line.results)):
            return 0
        if line.op == "fusion":
            read = sum(
                min(array.in_hbm_size, self._read(line.called, i))
                for i, name in enumerate(line.operands)
                for array in self.arrays[name][:1]
            )
            return read + self._written(line.called, line.results)
        written = sum(array.in_hbm_size for array in line.results)
        if line.op in _SLICES:
            return 2 * written
        if line.op in _UPDATES:
            return 2 * self.arrays[line.operands[_UPDATES[line.op]]][0].size
        return written + sum(array.in_hbm_size for array in inputs)

    def copies(self, computation: str, shapes: set[tuple[int, ...]]) -> list[int]:
        """Bytes of the arrays of these shapes, in any order of axes, that are copied in HBM."""
        return [
            line.results[0].size
            for line in self.computations[computation]
            if self._is_move(line)
            and tuple(sorted(line.results[0].shape)) in shapes
            and all(a.in_hbm for a in (line.results[0], self.arrays[line.operands[0]][0]))
        ]

    def _is_move(self, line: _Instruction) -> bool:
        if line.op != "fusion":
            return line.op in _MOVES
        inner = self.computations[line.called]
        return {i.op for i in inner} <= {"parameter", "copy", "transpose", "bitcast", "reshape"}

    def _read(self, computation: str, number: int) -> int:
        """Bytes that a fusion reads of its operand of that number, at most."""
        lines = self.computations[computation]
        (parameter,) = (
            line.name for line in lines if line.op == "parameter" and line.operands == [str(number)]
        )
        return self._used(lines, parameter)

    def _used(self, lines: list[_Instruction], name: str) -> int:
        total = 0
        for line in lines:
            for place, operand in enumerate(line.operands):
                if operand != name:
                    continue
                if line.op in _SLICES and place == 0:
                    total += line.results[0].size
                elif line.op in _UPDATES and place == 0:
                    continue
                elif line.op == "bitcast" and line is not lines[-1]:
                    total += self._used(lines, line.name)
                elif line.op == "fusion":
                    total += self._read(line.called, place)
                else:
                    total += self.arrays[name][0].size
        return total

    def _written(self, computation: str, results: list[_Array]) -> int:
        """Bytes that a fusion writes, or moves where it updates an operand in place."""
        lines = {line.name: line for line in self.computations[computation]}
        root = list(lines.values())[-1]
        ends = root.operands if root.op == "tuple" else [root.name]
        total = 0
        for end, result in zip(ends, results, strict=False):
            line = lines[end]
            while line.op == "bitcast":
                line = lines[line.operands[0]]
            if line.op in _UPDATES:
                total += 2 * self.arrays[line.operands[_UPDATES[line.op]]][0].size
            elif line.op == "fusion":
                total += self._written(line.called, [result])
            else:
                total += result.in_hbm_size
        return total


def _arrays(text: str) -> list[_Array]:
    """The arrays of a type, those of a tuple one after another."""
    found = re.findall(r"([a-z]\w*)\[([\d,]*)\](?:\{([\d,]*)(?::([^}]*))?\})?", text)
    return [_array(*parts) for parts in found]


def _array(dtype: str, dims: str, order: str, memory: str) -> _Array:
    shape = tuple(int(d) for d in dims.split(",") if d)
    bits = 8 if dtype == "pred" else int(re.sub(r"\D", "", dtype.split("e")[0]) or 0)
    padded = [shape[int(axis)] for axis in order.split(",") if axis]  # the minor axis first
    tile = re.search(r"T\(([\d,]+)\)", memory)
    if tile:
        for axis, size in enumerate(reversed([int(n) for n in tile[1].split(",")][-2:])):
            if axis < len(padded):
                padded[axis] += -padded[axis] % size
    return _Array(shape, math.prod(padded) * bits // 8, "S(" not in memory)


if __name__ == "__main__":
    main(tyro.cli(Options))
