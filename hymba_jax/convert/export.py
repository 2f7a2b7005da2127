"""`hymba export`: the parameters of a run, or an average of them, as a model or an adapter."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
import tyro
from flax import nnx

from hymba_jax.checkpoint.checkpoints import OPTIMIZER, Step, load_params, one_line, resolve_step
from hymba_jax.checkpoint.checksums import check_tree
from hymba_jax.checkpoint.load import load_merged_params, merged_params
from hymba_jax.checkpoint.model_file import read_model_directory, read_trainable
from hymba_jax.checkpoint.save import check_absent, save_model
from hymba_jax.config.adapter import AdapterConfig
from hymba_jax.config.run import CONFIG_FILE, RunConfig
from hymba_jax.convert.hf_tokenizer import write_hf_tokenizer
from hymba_jax.convert.peft import merge_peft, peft_tokenizer, write_peft
from hymba_jax.errors import HymbaError
from hymba_jax.files import resolve_path, written_beside
from hymba_jax.model import Hymba
from hymba_jax.model.abstract import Params, abstract_model
from hymba_jax.model.trainable import Trainable, join
from hymba_jax.parallel.mesh import make_mesh
from hymba_jax.run_files import FOLDER, checkpoint_steps
from hymba_jax.tokenizer import Tokenizer

EMA = "ema"  # its name in the optimizer's state, and on the command line
LAST = "last:"


@dataclass(frozen=True)
class ExportConfig:
    """Writes the parameters of a run's checkpoint, or an average, as a standalone model.

    A run that trained an adapter needs --merge or --adapter.

    Attributes:
      run: directory of a training run; with `merge_peft`, of a standalone model, too.
      output: directory to write, which must not exist.
      average: `ema`, the moving average of a run with training.ema_decay; or `last:N`, the mean of
        the newest N of the training.keep_checkpoints that a run keeps on its schedule: at multiples
        of training.checkpoint_every and where stages end. Of a run that trained an adapter, `ema`
        averages the adapter's matrices, and `last:N` the merged models, so it needs --merge.
      step: which checkpoint, or "best", of the lowest validation loss; the newest if absent.
      merge: merges the run's adapter into the model.
      adapter: writes the run's adapter alone, as a PEFT adapter of the model that it started from,
        with the run's tokenizer.
      merge_peft: directory of a PEFT adapter, of whatever library, that is merged into the model.

    Raises:
      HymbaError: there is no such average, or it is of no step, or both a model and an adapter
        are wanted.
    """

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    output: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="OUTPUT")]
    average: str = ""
    step: Step | None = None
    merge: bool = False
    adapter: bool = False
    merge_peft: str = ""

    def __post_init__(self) -> None:
        if not re.fullmatch(f"|{EMA}|{LAST}[1-9][0-9]{{0,8}}", self.average):
            raise HymbaError(f"average is {self.average!r}, neither {EMA} nor last:N")
        if self.average.startswith(LAST) and self.step is not None:
            raise HymbaError(f"{self.average} is of the newest checkpoints: leave --step out")
        if self.merge and self.adapter:
            raise HymbaError("merge writes a model, adapter an adapter: name one of them")
        if self.adapter and self.average.startswith(LAST):
            raise HymbaError(
                f"{self.average} of adapters is no adapter of their rank: write a model with "
                "--merge, or leave --average out"
            )
        if self.merge_peft and (self.average or self.merge or self.adapter):
            raise HymbaError(
                "merge_peft takes a model as it is: leave average, merge and adapter out"
            )


def main(args: ExportConfig) -> None:
    """Writes the model or adapter, and prints what it is.

    Raises:
      HymbaError: there is no run, or it has no such average, or no adapter; the output exists, or
        cannot be written.
    """
    run, output = resolve_path(args.run).absolute(), resolve_path(args.output)
    check_absent(output)
    if args.merge_peft:
        _write_merged(run, args.step, resolve_path(args.merge_peft), output)
        return
    steps = _steps(run, args)
    config, compute = read_model_directory(run, steps[-1])
    trainable = read_trainable(run)
    adapter = trainable.adapter
    _check_form(run, args, adapter)
    mesh = make_mesh(jax.devices()[:1])
    graph, abstract = abstract_model(config, compute, mesh, adapter)
    what, params = _chosen(run, args, steps, trainable, graph, abstract)
    if args.adapter:
        base = RunConfig.from_toml(run / CONFIG_FILE).init_from
        with written_beside(output) as beside:
            write_peft(
                beside, params, config, adapter, scan_layers=compute.scan_layers, base_model=base
            )
            write_hf_tokenizer(Tokenizer.load(run), config, beside)
        print(f"{output}: adapter, {what} of {run}")
        return
    if args.merge:
        graph, abstract = abstract_model(config, compute, mesh)
    params = jax.tree.map(lambda a, like: a.astype(like.dtype), params, abstract)
    save_model(output, nnx.merge(graph, params), Tokenizer.load(run), hf_files_of=run)
    print(f"{output}: {what} of {run}{', adapter merged' * bool(adapter)}")


def _steps(run: Path, args: ExportConfig) -> list[int]:
    """The checkpoints that are read: one, or those of `last:N`, which are of one stage's model."""
    steps = checkpoint_steps(run)
    if not steps:
        read_model_directory(run)  # says so if it is no directory of a model
        raise HymbaError(f"{run}: no run with a checkpoint")
    if args.average.startswith(LAST):
        return _last(run, int(args.average.removeprefix(LAST)))
    step = resolve_step(run, args.step)
    return [steps[-1] if step is None else step]


def _chosen(
    run: Path,
    args: ExportConfig,
    steps: list[int],
    trainable: Trainable,
    graph: nnx.GraphDef[Hymba],
    abstract: Params,
) -> tuple[str, Params]:
    """What is written, in words, and its parameters, in float32 where they are a mean."""

    def formed(params: Params) -> Params:
        return merged_params(graph, params) if args.merge else params

    step = steps[-1]
    if args.average == EMA:
        return f"moving average at step {step}", formed(_ema(run, trainable, abstract, step))
    if not args.average:
        return f"step {step}", formed(load_params(run, abstract, step))
    wide = _in_float32(abstract)
    mean = _mean(formed(load_params(run, wide, step)) for step in steps)
    return f"mean of steps {', '.join(map(str, steps))}", mean


def _write_merged(directory: Path, step: Step | None, adapter: Path, output: Path) -> None:
    """Writes the model of a directory with a PEFT adapter merged."""
    found, mesh = resolve_step(directory, step), make_mesh(jax.devices()[:1])
    config, compute = read_model_directory(directory, found)
    graph, _ = abstract_model(config, compute, mesh)
    params = load_merged_params(directory, config, compute, mesh, found)
    model = merge_peft(adapter, nnx.merge(graph, params))
    tokenizer = peft_tokenizer(adapter, Tokenizer.load(directory), config)
    save_model(output, model, tokenizer, hf_files_of=directory)
    print(f"{output}: {directory} with {adapter} merged")


def _check_form(run: Path, args: ExportConfig, adapter: AdapterConfig) -> None:
    """Raises HymbaError unless it is clear what to write of a run."""
    if adapter and not (args.merge or args.adapter):
        raise HymbaError(
            f"{run}: trained an adapter: write a model with --merge, or the adapter with --adapter"
        )
    if not adapter and (args.merge or args.adapter):
        raise HymbaError(f"{run}: trained no adapter: leave --merge and --adapter out")


def _last(run: Path, count: int) -> list[int]:
    """The newest checkpoints on schedule, without gaps: older ones may be there by chance."""
    config = RunConfig.from_toml(run / CONFIG_FILE)
    steps = [step for step in checkpoint_steps(run) if config.is_checkpoint_due(step)]
    kept = steps[-config.training.keep_checkpoints :]
    if len(kept) < count:
        raise HymbaError(
            f"{run / FOLDER}: keeps {len(kept)} checkpoints on schedule, not {count}: average "
            "fewer, or train with a larger training.keep_checkpoints"
        )
    averaged = kept[-count:]
    if len({config.stage_at(step).run.model for step in averaged}) > 1:
        raise HymbaError(
            f"{run}: steps {', '.join(map(str, averaged))} are of stages with different models, "
            "such as another RoPE base: average fewer"
        )
    return averaged


def _mean(checkpoints: Iterator[Params]) -> Params:
    """The mean of parameters; of those that are equal in all, as frozen ones are, it is exact."""
    mean = next(checkpoints)
    for count, params in enumerate(checkpoints, start=2):
        change = jax.tree.map(jnp.subtract, params, mean)
        mean = jax.tree.map(partial(_add_part, count), mean, change)
    return mean


def _add_part(count: int, mean: jax.Array, change: jax.Array) -> jax.Array:
    return mean + change / count


def _ema(run: Path, trainable: Trainable, abstract: Params, step: int) -> Params:
    """The moving average of a checkpoint, with its frozen parameters, which have none."""
    trained, frozen = trainable.split(abstract)
    average = _stored_average(run, trained, step)
    return join(average, trainable.split(load_params(run, abstract, step))[1] if frozen else {})


def _stored_average(run: Path, abstract: Params, step: int) -> Params:
    """The moving average in the optimizer's state of a checkpoint; no more of that is read."""
    path = run / FOLDER / str(step) / OPTIMIZER
    with one_line(path, _UNREADABLE):
        metadata = ocp.StandardCheckpointHandler().metadata(path)
    if EMA not in metadata.tree:
        raise HymbaError(
            f"{path}: has no moving average, as training.ema_decay was 0: use --average last:N"
        )
    wanted = {EMA: _in_float32(abstract)}
    restore = ocp.args.PyTreeRestore(
        wanted,
        restore_args=ocp.checkpoint_utils.construct_restore_args(wanted),
        partial_restore=True,
    )
    handler = ocp.PyTreeCheckpointHandler()
    with one_line(path, _UNREADABLE), ocp.Checkpointer(handler) as checkpointer:
        stored = checkpointer.restore(path, args=restore)
    check_tree(path, stored, metadata.custom_metadata)
    return jax.tree.map(lambda a, like: a.astype(like.dtype), stored[EMA], abstract)


def _in_float32(abstract: Params) -> Params:
    return jax.tree.map(lambda like: like.update(dtype=jnp.float32), abstract)


_UNREADABLE = "not an optimizer state of this model that can be read"
