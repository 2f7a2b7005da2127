"""A whole run as one object, from a TOML file and the command line.

A file holds the fields of `RunConfig` by their names, those of its parts in tables:

    output = "runs/mine"

    [model]
    preset = "hymba-125m"
    max_positions = 2048

    [training]
    steps = 1000

What it leaves out keeps its default, for the model that of the preset if one is named: but for
vocab_size, which is then that of the run's tokenizer. On the command line any field can be
overridden: `--training.steps 100`.
"""

import argparse
import dataclasses
import difflib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import tyro

from hymba_jax.config import PRESETS, ComputeConfig, HymbaConfig
from hymba_jax.data.config import SMALLEST_VOCABULARY, DataConfig
from hymba_jax.data.tokenizer import Tokenizer
from hymba_jax.distributed import DistributedConfig
from hymba_jax.errors import HymbaError
from hymba_jax.field_types import Bounds, bound_problems, misfit, shown, type_problems
from hymba_jax.files import read_toml, resolve_path
from hymba_jax.hf_files import HF_CONFIG, download_advice
from hymba_jax.parallel import ParallelConfig
from hymba_jax.training.config import TrainingConfig

CONFIG_FILE = "config.toml"  # inside a run directory

RUN_BOUNDS = {"seed": Bounds(0, 2**32 - 1, "JAX takes 32 bits of it")}


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides a training run.

    Attributes:
      output: the run directory: config, tokenizer, metrics and checkpoints.
      seed: random seed of the initial parameters, the order of the data and the sample.
      init_from: directory of a model or a run whose newest parameters initialize the run; they are
        random if it is empty. Named on the command line, its model and its tokenizer are the
        defaults of the run's. A run that resumes ignores it.
      profile: traces a few of the first steps, for XProf, into `profile` in the run directory.

    Raises:
      HymbaError: the parts do not fit one another.
    """

    output: str = "runs/hymba"
    seed: int = 0
    init_from: str = ""
    profile: bool = False
    model: HymbaConfig = field(default_factory=lambda: HymbaConfig(vocab_size="auto"))
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)

    def __post_init__(self) -> None:
        problems = [*type_problems(self)] or [*self._value_problems()]
        if problems:
            raise HymbaError("run config: " + "; ".join(problems))

    def _value_problems(self) -> Iterator[str]:
        yield from bound_problems(self, RUN_BOUNDS)
        if not self.output:
            yield "output is empty: name a directory"
        if self.data.sequence_length > self.model.max_positions:
            yield (
                f"data.sequence_length {self.data.sequence_length} is longer than "
                f"model.max_positions {self.model.max_positions}"
            )

    @classmethod
    def from_toml(
        cls, path: str | os.PathLike[str], base: "RunConfig | None" = None
    ) -> "RunConfig":
        """Reads a file.

        Args:
          base: has the values that the file leaves out; the defaults if absent.

        Raises:
          HymbaError: it isn't there or isn't TOML; it has unknown fields or values of a wrong
            type (all are named); or the values fit no run.
        """
        base, table = _read(path, base or cls())
        return _override_from(path, base, table)

    def to_toml(self) -> str:
        """The file that `from_toml` reads as this config; every field is in it."""
        return "\n".join(_toml_lines(self, "")).lstrip() + "\n"


def read_model(path: str | os.PathLike[str]) -> tuple[HymbaConfig, ComputeConfig]:
    """The model of a file and how it computes, whatever run the file may be of.

    A vocab_size of "auto" becomes a number as in `with_vocabulary`.

    Raises:
      HymbaError: as for `RunConfig.from_toml`.
    """
    base, table = _read(path, RunConfig())
    model = _override_from(path, base.model, table.get("model", {}))
    if model.vocab_size == "auto":
        data = _override_from(path, base.data, table.get("data", {}))
        model = model.with_vocabulary(_vocabulary(data))
    return model, _override_from(path, base.compute, table.get("compute", {}))


def with_vocabulary(run: RunConfig) -> RunConfig:
    """The run with a number for a vocab_size of "auto", before there is text.

    It is the size of the tokenizer, for a BPE the one that is asked for: trained on very little
    text it can come out smaller.

    Raises:
      HymbaError: the tokenizer cannot be read.
    """
    if run.model.vocab_size != "auto":
        return run
    return dataclasses.replace(run, model=run.model.with_vocabulary(_vocabulary(run.data)))


def _vocabulary(data: DataConfig) -> int:
    if data.tokenizer == "bytes":
        return SMALLEST_VOCABULARY
    return data.bpe_size or Tokenizer.load(data.tokenizer).vocab_size


def read_model_directory(
    directory: str | os.PathLike[str],
) -> tuple[HymbaConfig, ComputeConfig]:
    """The model that a directory of ours holds and how it computes.

    Raises:
      HymbaError: there is none, or its file cannot be read.
    """
    directory = resolve_path(directory)
    if (directory / CONFIG_FILE).is_file():
        return read_model(directory / CONFIG_FILE)
    advice = download_advice(directory)
    if (directory / HF_CONFIG).is_file():
        advice = f": convert the HF checkpoint first, hymba convert {directory} TARGET"
    raise HymbaError(f"{directory}: no model is here, there is no {CONFIG_FILE}{advice}")


def model_toml(model: HymbaConfig, compute: ComputeConfig) -> str:
    """A file of which `read_model` reads these two."""
    lines = [*_toml_lines(model, "model"), *_toml_lines(compute, "compute")]
    return "\n".join(lines).lstrip() + "\n"


def parse_run(args: Sequence[str], prog: str) -> tuple[RunConfig, DistributedConfig]:
    """The run that a command line asks for: `--config FILE`, and fields to override.

    Beside it stands how this process finds the others of the run, which no file says.

    What neither says is as in the directory of `--init-from`, if there is one.

    Raises:
      HymbaError: what it asks for cannot be.
      SystemExit: for --help, and for arguments that are no fields.
    """
    default = run_defaults(args)

    def arguments(
        run: Annotated[RunConfig, tyro.conf.arg(name="")] = default,
        config: str = "",
        distributed: DistributedConfig = DistributedConfig(),  # noqa: B008, it is frozen
    ) -> tuple[RunConfig, DistributedConfig]:
        """Trains a model. The same command again resumes a run that was stopped.

        Args:
          config: TOML file; its values are the defaults of all other options.
        """
        return run, distributed

    run, distributed = tyro.cli(arguments, args=args, prog=prog)
    return _with_resolved_paths(run), distributed


def _with_resolved_paths(config: RunConfig) -> RunConfig:
    """The same with every path resolved, so that one that cannot be used is refused at once."""

    def resolved(path: str) -> str:
        return str(resolve_path(path)) if path else path

    data = dataclasses.replace(
        config.data, path=resolved(config.data.path), tokenizer=resolved(config.data.tokenizer)
    )
    return dataclasses.replace(
        config, output=resolved(config.output), init_from=resolved(config.init_from), data=data
    )


def run_defaults(args: Sequence[str]) -> RunConfig:
    """The run of a command line's `--config` and `--init-from`, before its fields are overridden.

    Raises:
      HymbaError: one of them cannot be read.
    """
    peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    peek.add_argument("--config")
    peek.add_argument("--init-from", "--init_from")  # tyro takes both
    named = peek.parse_known_args(args)[0]
    base = _started_from(named.init_from) if named.init_from else RunConfig()
    return base if named.config is None else RunConfig.from_toml(named.config, base)


def _started_from(directory: str) -> RunConfig:
    """A run with the model of a directory and, if it has one, the tokenizer."""
    model, data = read_model_directory(directory)[0], DataConfig()
    data = dataclasses.replace(data, sequence_length=min(data.sequence_length, model.max_positions))
    if (resolve_path(directory) / "tokenizer.json").is_file():
        data = dataclasses.replace(data, tokenizer=directory)
    return RunConfig(init_from=directory, model=model, data=data)


def _read(path: str | os.PathLike[str], base: RunConfig) -> tuple[RunConfig, dict[str, Any]]:
    """The config that a file starts from, and the file's fields, all of which it has."""
    path = resolve_path(path)
    table = read_toml(path)
    preset = table["model"].pop("preset", None) if isinstance(table.get("model"), dict) else None
    if preset is not None:
        if not isinstance(preset, str) or preset not in PRESETS:
            raise HymbaError(
                f"{path}: model.preset is {shown(preset)}, not one of {', '.join(PRESETS)}"
            )
        model = dataclasses.replace(PRESETS[preset], vocab_size="auto")
        base = dataclasses.replace(base, model=model)
    problems = [*_misfits(base, table, "")]
    if problems:
        raise HymbaError(f"{path}: " + "; ".join(problems))
    return base, table


def _misfits(base: Any, table: dict[str, Any], where: str) -> Iterator[str]:
    """What in the table is no field of `base`, or no value for its field."""
    types = {item.name: item.type for item in dataclasses.fields(base)}
    for name, value in table.items():
        dotted = where + name
        if name not in types:
            near = difflib.get_close_matches(name, types, n=1)
            hint = f"did you mean {where}{near[0]}?" if near else f"there are {', '.join(types)}"
            yield f"unknown field {dotted}, {hint}"
        elif dataclasses.is_dataclass(getattr(base, name)):
            if isinstance(value, dict):
                yield from _misfits(getattr(base, name), value, f"{dotted}.")
            else:
                yield f"{dotted} is {shown(value)}, not a table"
        elif problem := misfit(value, types[name]):
            yield f"{dotted} {problem}"


def _override_from[T](path: str | os.PathLike[str], base: T, table: dict[str, Any]) -> T:
    try:
        return _override(base, table)
    except HymbaError as error:
        raise HymbaError(f"{path}: {error}") from error


def _override[T](base: T, table: dict[str, Any]) -> T:
    """The same with the table's values."""
    changes = {
        name: _override(getattr(base, name), value) if isinstance(value, dict) else value
        for name, value in table.items()
    }
    return dataclasses.replace(base, **changes)  # type: ignore[type-var]


def _toml_lines(config: Any, where: str) -> Iterator[str]:
    values = {item.name: getattr(config, item.name) for item in dataclasses.fields(config)}
    tables = {name: value for name, value in values.items() if dataclasses.is_dataclass(value)}
    if where:
        yield f"\n[{where}]"
    for name, value in values.items():
        if name not in tables:
            text = json.dumps(value, ensure_ascii=False)  # which TOML reads, but for one character
            yield f"{name} = {text.replace('\x7f', '\\u007f')}"
    for name, value in tables.items():
        yield from _toml_lines(value, f"{where}.{name}" if where else name)
