"""The run directory: self-contained, with config, tokenizer, metrics and checkpoints."""

import dataclasses
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from importlib.metadata import version
from typing import Any

import jax

from hymba_jax.checkpoint.checkpoints import PARAMS
from hymba_jax.config.field_types import leaves
from hymba_jax.config.run import CONFIG_FILE, RunConfig
from hymba_jax.config.stages import OWN_SETTINGS, SCHEDULE_SETTINGS, Stage
from hymba_jax.data import Data
from hymba_jax.errors import HymbaError
from hymba_jax.files import Location, matches, replace_text, resolve_location
from hymba_jax.parallel.processes import barrier, require_agreement
from hymba_jax.run_files import FOLDER, checkpoint_steps, uses_orbax
from hymba_jax.tokenizer import Tokenizer

_PACKAGES = ("hymba_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
# Files of HF checkpoints, and those of a run that never come without its config.
_FOREIGN = (
    *("config.json", "*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin"),
    *("tokenizer.json", "tokenizer_config.json", "metrics.jsonl"),
)
_VISIBILITY_TIMEOUT = 10  # seconds: file systems of a network may cache what was not there


def check_output(output: str, init_from: str) -> None:
    """Raises HymbaError if the output would be mixed with other files in the directory."""
    directory = resolve_location(output)
    if not uses_orbax(directory) and jax.process_count() > 1:
        raise HymbaError(
            f"{directory}: Orbax does not write there, which takes a single process: choose an "
            "output in a gs:// bucket, or on a file system that all processes share"
        )
    if init_from:
        there, here = resolve_location(init_from).resolve(), directory.resolve()
        if here == there or here in there.parents or there in here.parents:
            raise HymbaError(
                f"{directory}: is, contains or lies inside the init_from directory {init_from}: "
                "choose another output"
            )
    if (directory / PARAMS).exists():
        raise HymbaError(
            f"{directory}: holds a standalone model ({PARAMS}), which would be used instead of the "
            "run's checkpoints: choose another output, or start from it with --init-from"
        )
    if not (directory / CONFIG_FILE).is_file():
        found = sorted({path.name for pattern in _FOREIGN for path in matches(directory, pattern)})
        if found:
            raise HymbaError(
                f"{directory}: has {', '.join(found[:3])} but no {CONFIG_FILE}, so it was not "
                "written by hymba_jax: choose another output"
            )


def read_run(output: str) -> RunConfig | None:
    """The config of the run that has a checkpoint in the directory; None if there is none.

    Raises:
      HymbaError: its config cannot be read.
    """
    directory = resolve_location(output)
    if not checkpoint_steps(directory):
        return None
    if not (directory / CONFIG_FILE).is_file():
        raise HymbaError(
            f"{directory}: has {FOLDER} but no {CONFIG_FILE}, so it was not written by hymba_jax: "
            "choose another output"
        )
    return RunConfig.from_toml(directory / CONFIG_FILE)


def check_resumes(previous: RunConfig, config: RunConfig, step: int) -> None:
    """Raises HymbaError if a config changes what a run that it resumes cannot change.

    Stages that have not begun may change, with the sources that they alone read, and the one that
    is under way may become longer.

    Args:
      step: steps done.
    """
    both = previous.data.sources.keys() & config.data.sources.keys()
    held_out = previous.data.validation.keys() & config.data.validation.keys()
    before, now = (_fixed_on_resume(each, both, held_out) for each in (previous, config))
    changed = [*_differences("", before, now)]
    begun = [stage for stage in previous.resolved_stages if stage.start < step or not stage.start]
    stages = config.resolved_stages
    if previous.stages and not config.stages:
        changed.append(f"it has the stages {', '.join(previous.stages)}, the config none")
        begun = []  # which nothing is to be compared with
    if previous.data.sources:
        _check_new_sources(config, stages[: len(begun)], config.data.sources.keys() - both)
    for number, old in enumerate(begun):
        if number == len(stages):
            changed.append(f"stages.{old.name} has gone")
            continue
        new = stages[number]
        before, now = _fixed_in_stage(old), _fixed_in_stage(new)
        if old.name:
            before, now = {"name": old.name} | before, {"name": new.name} | now
        if old.stop < step:
            before |= _fixed_when_done(old)
            now |= _fixed_when_done(new)
        elif step < new.stop:
            before |= _fixed_until_done(old)
            now |= _fixed_until_done(new)
        changed += _differences(f"stages.{new.name}: " if new.name else "", before, now)
    if changed:
        forgotten = previous.init_from if not config.init_from else ""
        undo = f"give --init-from {forgotten} again" if forgotten else "undo the changes"
        raise HymbaError(
            f"{config.output}: holds a run with different settings ({'; '.join(changed)}): choose "
            f"another output, or {undo}"
        )
    if stages[len(begun) - 1].stop < step:
        last = stages[len(begun) - 1]
        name = f"stages.{last.name}.steps" if last.name else "training.steps"
        is_done = "finished, " if previous.resolved_stages[-1].stop <= step else ""
        raise HymbaError(
            f"{config.output}: is {is_done}at step {step}, {name} is {last.run.training.steps}: "
            "set more steps, or choose another output"
        )


def _check_new_sources(config: RunConfig, begun: Sequence[Stage], new: Set[str]) -> None:
    """Raises HymbaError if stages that have begun would read new sources, as they name none."""
    for stage in begun:
        names_none = not stage.name or not config.stages[stage.name].sources
        if names_none and (read := [name for name in stage.shares if name in new]):
            source = read[0]
            raise HymbaError(
                f"{config.output}: {stage.label} has begun without the new source {source}, and "
                "reads it now, as it names no sources: set "
                f"data.sources.{source}.weight to 0, and stages.NAME.sources.{source}.weight of "
                "the new stages that are to read it"
            )


def _differences(where: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    for name in dict.fromkeys((*before, *now)):
        if name not in now:
            yield f"{where}{name} was {before[name]!r}, and has gone"
        elif name not in before:
            yield f"{where}{name} is {now[name]!r}, and was not there"
        elif now[name] not in (before[name], "auto"):  # "auto" was resolved by the run
            yield f"{where}{name} was {before[name]!r}, is {now[name]!r}"


def write_run_directory(config: RunConfig, tokenizer: Tokenizer) -> None:
    """Makes the directory and writes what inference needs beside a checkpoint."""
    directory = resolve_location(config.output)
    directory.mkdir(parents=True, exist_ok=True)
    replace_text(directory / CONFIG_FILE, config.to_toml())
    tokenizer.save(directory)


def check_processes(settings: Mapping[str, Any], output: str) -> None:
    """Raises HymbaError unless all processes have one config, packages, and see one run directory.

    Output and data may be mounted elsewhere in each process: contents are compared.

    Args:
      settings: values of the config by their dotted names.
    """
    settings = {name: value for name, value in settings.items() if not _may_differ(name)}
    steps = checkpoint_steps(output)
    settings["the newest checkpoint in output"] = steps[-1] if steps else None
    settings |= {f"package {name}": version(name) for name in _PACKAGES}
    require_agreement(settings)


def _may_differ(name: str) -> bool:
    """Whether processes may have different values of a setting, as it names a place."""
    places = ("output", "data.tokenizer", "data.chat_template")
    return name in places or _is_source_path(name)


def _is_source_path(name: str) -> bool:
    """Whether a setting is the path of a source: its tokens are compared instead."""
    return name.startswith("data.") and name.endswith("path")


def check_data(data: Data) -> None:
    """Raises HymbaError unless all processes have the same tokenizer and tokens."""
    digests = {f"the digest of {source}": digest for source, digest in data.digests.items()}
    require_agreement({"the digest of data.tokenizer": data.tokenizer.fingerprint} | digests)


def check_written(output: str) -> None:
    """Raises HymbaError unless all processes see what the first of them wrote."""
    barrier("the run directory")
    check_visible(output, [resolve_location(output) / CONFIG_FILE])


def check_visible(output: str, files: Iterable[Location]) -> None:
    """Raises HymbaError unless this process sees files that the first of them has written."""
    missing = [*files]
    deadline = time.monotonic() + _VISIBILITY_TIMEOUT
    while missing := [file for file in missing if not file.is_file()]:
        if time.monotonic() > deadline:
            raise HymbaError(
                f"{output}: process {jax.process_index()} does not see what process 0 wrote "
                "there: choose an output on a file system that all share"
            )
        time.sleep(0.1)


def _fixed_on_resume(config: RunConfig, sources: Set[str], validation: Set[str]) -> dict[str, Any]:
    """The settings that cannot change on resuming, in no stage: shapes and layout.

    The corpus may move: its tokens are compared, by their digest.

    Args:
      sources, validation: of training and of validation, those whose settings are compared: others
        are new, or have gone.
    """
    fixed = {
        "seed": config.seed,
        "training.optimizer": config.training.optimizer,
        "training.ema_decay": config.training.ema_decay,
        "training.freeze": config.training.freeze,
        "compute.param_dtype": config.compute.param_dtype,
        "compute.scan_layers": config.compute.scan_layers,
    }
    fixed |= dict(leaves(config.adapter, "adapter."))
    fixed |= dict(leaves(config.model.resolved(), "model."))
    kept = dataclasses.replace(
        config.data,
        sources={name: each for name, each in config.data.sources.items() if name in sources},
        validation={
            name: each for name, each in config.data.validation.items() if name in validation
        },
    )
    fixed |= {name: value for name, value in leaves(kept, "data.") if not _is_source_path(name)}
    return {
        name: value
        for name, value in fixed.items()
        if name not in OWN_SETTINGS and not name.endswith(".weight")
    }


def _fixed_when_done(stage: Stage) -> dict[str, Any]:
    """The settings that had their effect in a stage that another one follows."""
    names = ("steps", *SCHEDULE_SETTINGS)
    return {f"training.{name}": getattr(stage.run.training, name) for name in names}


def _fixed_until_done(stage: Stage) -> dict[str, Any]:
    """The settings that cannot change while a stage is under way: the dtype that its teacher's
    parameters are in, by which they are compared."""
    has_teacher = stage.run.training.objective == "distill"
    return {"compute.dtype": stage.run.compute.dtype} if has_teacher else {}


def _fixed_in_stage(stage: Stage) -> dict[str, Any]:
    """The settings that cannot change in a stage that has begun: the order of the data, and which
    text the best checkpoint is chosen by."""
    run, training = stage.run, stage.run.training
    fixed: dict[str, Any] = {
        "training.batch_size": training.batch_size,
        "training.objective": training.objective,
        "training.validate_on": training.validate_on,
        "training.validation_sequences": training.validation_sequences,
        "the order of sources": [*stage.shares],
    }
    if training.objective == "dpo":
        fixed |= dict(leaves(run.dpo, "dpo."))
    if training.objective == "distill":  # the teacher may move: its parameters are compared
        fixed |= {
            "distill.temperature": run.distill.temperature,
            "distill.weight": run.distill.weight,
        }
    own = {**dict(leaves(run.data, "data.")), **dict(leaves(run.model.resolved(), "model."))}
    fixed |= {name: value for name, value in own.items() if name in OWN_SETTINGS}
    return fixed | {f"the share of {name}": share for name, share in stage.shares.items()}
