"""`hymba compile`: compiles a run's program ahead of time, no device needed."""

import dataclasses
import time
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import jax
from rich.console import Console
from rich.table import Table

from hymba_jax.aot.cost import ProgramCost, compile_and_analyze
from hymba_jax.aot.estimate import assumptions
from hymba_jax.aot.fit import Memory
from hymba_jax.aot.instructions import by_part
from hymba_jax.aot.programs import AotProgram, inference_program, training_program
from hymba_jax.aot.topology import Chip, Topology, parse_topology
from hymba_jax.checkpoint.model_file import with_vocabulary
from hymba_jax.config import CacheFormat, WeightFormat
from hymba_jax.config.data import DATA_BOUNDS
from hymba_jax.config.field_types import bound_problems, type_problems
from hymba_jax.config.model import find_preset
from hymba_jax.config.run import RunConfig
from hymba_jax.config.stages import StageConfig
from hymba_jax.config.training import TRAINING_BOUNDS
from hymba_jax.convert.init_from import InitialModel, read_initial_model
from hymba_jax.display import format_bytes
from hymba_jax.errors import HymbaError
from hymba_jax.training.arguments import names_model, parse_choice

COMPILE_BOUNDS = {
    "batch": TRAINING_BOUNDS["batch_size"],
    "context": DATA_BOUNDS["sequence_length"],
}


@dataclass(frozen=True)
class CompileConfig:
    """What to compile, and for which chips.

    Attributes:
      topology: a slice of chips, v5e:16x16, v5p:4x4x4, v6e:4x4 or h100:8 for example.
      preset: the model of a config that has no table [model] because --init-from names one:
        hymba-125m, hymba-350m or hymba-1.5b.
      teacher_preset: the teacher of objective distill, in place of the model in distill.teacher.
      program: the training step; prefill, of whole prompts in one chunk, where generation takes
        chunks of 1,024 tokens at most; or decode.
      stage: of training, the only stage to compile; all, one after another, if not named.
      batch: sequences that are prefilled or decoded at once, 1 if not named, rounded up to a power
        of two as generation does; a run has training.batch_size.
      context: tokens that they have, data.sequence_length if not named.
      weights: of matmuls in prefill and decode, "float" or "int8", with a scale for each output.
      kv_cache: format of keys and values in prefill and decode, "float" or "int8", with a scale for
        each head of each token.
      by_part: also print the estimated time and the HBM bytes of each part of the model.

    Raises:
      HymbaError: an option of inference is named for training, or a stage for inference, or one
        is impossible.
    """

    topology: str
    preset: str = ""
    teacher_preset: str = ""
    program: Literal["train", "prefill", "decode"] = "train"
    stage: str = ""
    batch: int | None = None
    context: int | None = None
    weights: WeightFormat = "float"
    kv_cache: CacheFormat = "float"
    by_part: bool = False

    def __post_init__(self) -> None:
        if problems := [*type_problems(self)] or [*bound_problems(self, COMPILE_BOUNDS)]:
            raise HymbaError("; ".join(problems))
        if self.program == "train" and (self.batch, self.context) != (None, None):
            raise HymbaError(
                "batch and context apply to prefill and decode only: "
                "training uses training.batch_size and data.sequence_length"
            )
        if self.program == "train" and (self.weights, self.kv_cache) != ("float", "float"):
            raise HymbaError("weights and kv_cache apply to prefill and decode only")
        for name in ("stage", "teacher_preset"):
            if self.program != "train" and (value := getattr(self, name)):
                raise HymbaError(f"{name} {value} applies to training only")


def main(args: Sequence[str], prog: str) -> None:
    """Compiles a program and prints what it costs. Exits with status 1 if it does not fit.

    Raises:
      HymbaError: there is no such run, topology or compiler, or the program does not fit.
    """
    does = "Compiles a run's programs ahead of time, no device needed, and says what they cost."
    choice, run = parse_choice(CompileConfig, args, prog, does)
    if not names_model(args):
        raise HymbaError(
            "no model is named: use --preset hymba-1.5b, --init-from DIRECTORY, or a config with "
            "a table [model]"
        )
    teacher = _teacher(choice, run)
    if teacher:  # its vocabulary is the student's
        run = dataclasses.replace(
            run, model=run.model.with_vocabulary(teacher.config.num_embeddings)
        )
    run = with_vocabulary(run)
    jax.config.update("jax_platforms", "cpu")  # the compiler is wanted, not its devices
    topology = parse_topology(choice.topology)
    console = Console(soft_wrap=True, highlight=False)
    needed = [
        _report(program, topology, console, show_parts=choice.by_part)
        for program in _programs(choice, run, teacher, topology.devices(), console)
    ]
    if too_large := [size for size in needed if size is not None]:
        sizes = ", ".join(map(format_bytes, too_large))
        available = format_bytes(topology.chip.memory)
        raise HymbaError(f"it does not fit: {sizes} of {available} per chip")


def _teacher(choice: CompileConfig, run: RunConfig) -> InitialModel | None:
    """The teacher of a run that has one.

    Raises:
      HymbaError: there is no such model, or nothing that it would teach.
    """
    if not run.distill.teacher:
        if choice.teacher_preset:
            raise HymbaError(
                f"teacher_preset is {choice.teacher_preset}, and the run has no objective distill"
            )
        return None
    if not choice.teacher_preset:
        return read_initial_model(run.distill.teacher)
    config = find_preset(choice.teacher_preset).resolved()
    return InitialModel(choice.teacher_preset, config, run.compute.scan_layers, None)


def _programs(
    choice: CompileConfig,
    run: RunConfig,
    teacher: InitialModel | None,
    devices: Sequence[jax.Device],
    console: Console,
) -> Iterator[AotProgram]:
    """What to compile; of a run with stages, each is announced before its own.

    Raises:
      HymbaError: there is no such stage.
    """
    stages = run.resolved_stages
    if choice.stage and choice.stage not in run.stages:
        raise HymbaError(
            f"stage is {choice.stage}: the run has {', '.join(run.stages) or 'no stages'}"
        )
    if choice.program == "train":
        compiled: dict[Hashable, str] = {}
        for stage in stages:
            if choice.stage not in ("", stage.name):
                continue
            same = compiled.setdefault(stage.compiled_for, stage.name)
            if stage.name:
                console.print(f"stage {stage.name}: steps {stage.start + 1:,} to {stage.stop:,}")
            if same != stage.name:
                console.print(f"the same program as stage {same}")
                continue
            own = run.stages.get(stage.name, StageConfig()).gradient_accumulation_steps
            table = "training" if own is None else f"stages.{stage.name}"
            yield training_program(stage.run, devices, teacher=teacher, table=table)
        return
    last = stages[-1].run
    context = last.data.sequence_length if choice.context is None else choice.context
    batch = 1 if choice.batch is None else choice.batch
    yield inference_program(
        last, choice.program, devices, batch, context, choice.weights, choice.kv_cache
    )


def _report(
    program: AotProgram, topology: Topology, console: Console, *, show_parts: bool
) -> int | None:
    """Compiles a program and prints what it costs; what it needs per chip if it does not fit."""
    console.print(f"{program.num_params:,} parameters, {topology.name}: {program.step}")
    console.print(program.sharding)
    begun = time.perf_counter()
    memory, cost = compile_and_analyze(program, topology.chip)
    console.print(f"compiled in {time.perf_counter() - begun:.0f} s")
    console.print(_table(program, topology.chip, memory, cost))
    if cost is not None:
        if show_parts:
            console.print(_parts_table(cost, topology.chip))
        console.print(assumptions(topology.chip))
    if memory.total <= topology.chip.memory and cost is not None:
        return None
    for change in program.advice(memory, topology.chip.memory):
        console.print(f"to make it fit, {change}")
    return memory.total


def _table(program: AotProgram, chip: Chip, memory: Memory, cost: ProgramCost | None) -> Table:
    table = Table(show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    fits = "fits" if memory.total <= chip.memory and cost else "does not fit"
    table.add_row("arguments per chip", format_bytes(memory.arguments))
    table.add_row("temporaries per chip", format_bytes(memory.temporaries))
    table.add_row(
        f"total, {fits} in {format_bytes(chip.memory)}",
        format_bytes(memory.total),
        end_section=True,
    )
    chips = program.mesh.size
    table.add_row("model FLOPs per step and chip", _tera(program.model_flops / chips))
    if cost is None:
        return table
    table.add_row("matmul FLOPs", _tera(cost.work.flops - cost.kernel_flops))
    table.add_row("matmul FLOPs in kernels", _tera(cost.kernel_flops))
    table.add_row("HBM bytes per chip", format_bytes(cost.work.hbm_bytes))
    if cost.unknown_loops:
        table.add_row("loops of unknown trip count, counted once", str(cost.unknown_loops))
    table.add_section()
    for kernel in cost.kernels:
        called = f"{kernel.calls:,} x {kernel.name} per chip, largest array"
        table.add_row(called, " x ".join(map(str, kernel.shape)))
    table.add_section()
    for kind, (count, size) in cost.collectives.items():
        table.add_row(f"{count:,} x {kind}, bytes sent per chip", format_bytes(size))
    table.add_section()
    seconds = cost.work.seconds(chip)
    for name, value in seconds.items():
        table.add_row(f"{name} alone", _seconds(value))
    step = max(seconds.values())
    table.add_row("step time, lower bound", _seconds(step))
    peak = chips * chip.peak_flops
    table.add_row("MFU, upper bound", f"{program.model_flops / (peak * step):.1%}")
    table.add_section()
    estimate = cost.step_seconds(chip)
    table.add_row("step time, estimated", _seconds(estimate))
    table.add_row("MFU, estimated", f"{program.model_flops / (peak * estimate):.1%}")
    return table


def _parts_table(cost: ProgramCost, chip: Chip) -> Table:
    table = Table("part", "estimated time", "HBM bytes")
    for part, (seconds, size) in by_part(cost.instructions, chip).items():
        table.add_row(part, _seconds(seconds), format_bytes(size))
    return table


def _tera(flops: float) -> str:
    return f"{flops / 1e12:,.2f} TFLOP"


def _seconds(value: float) -> str:
    return f"{value:.3g} s" if value >= 1 else f"{1e3 * value:.3g} ms"
