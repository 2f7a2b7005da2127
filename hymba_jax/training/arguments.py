"""The command line of a training run."""

import argparse
import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Annotated, Any

import tyro

from hymba_jax.command_line import parse_command_line
from hymba_jax.config.data import DataConfig, SourceConfig, is_generated
from hymba_jax.config.distributed import DistributedConfig
from hymba_jax.config.model import HymbaConfig, find_preset
from hymba_jax.config.run import RunConfig
from hymba_jax.convert.init_from import read_config
from hymba_jax.data.listing import is_url
from hymba_jax.errors import HymbaError
from hymba_jax.files import read_toml, resolve_location, resolve_path

_OF_SOURCE = re.compile(r"--data\.(sources|validation)\.([^.=]+)\.")


def parse_run(args: Sequence[str], prog: str) -> tuple[RunConfig, DistributedConfig]:
    """The run of a command line: `--config FILE`, and fields to override.

    With it the options of multi-process initialization, which no file contains. Other defaults
    come from the directory of `--init-from`, if given.

    Raises:
      HymbaError: an option is invalid.
      SystemExit: for --help, and for unknown options.
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

    run, distributed = parse_command_line(arguments, args, prog)
    return _with_resolved_paths(run), distributed


def parse_choice[T](
    choice: type[T], args: Sequence[str], prog: str, does: str
) -> tuple[T, RunConfig]:
    """The options of a command about a run that does not train it, and the run.

    Args:
      choice: the command's own options, a dataclass.
      does: what the command does, for its help.

    Raises:
      HymbaError: an option is invalid.
      SystemExit: for --help, and for unknown options.
    """
    default = run_defaults(args)

    def arguments(
        choice: Annotated[choice, tyro.conf.arg(name="")],  # type: ignore[valid-type]
        run: Annotated[RunConfig, tyro.conf.arg(name="")] = default,
        config: str = "",
    ) -> tuple[Any, RunConfig]:
        """Takes a command line.

        Args:
          config: TOML file; its values are the defaults of the run's options.
        """
        return choice, run

    return parse_command_line(arguments, args, prog, description=does)


def _with_resolved_paths(config: RunConfig) -> RunConfig:
    """The same with every path resolved, so that an invalid one fails immediately."""

    def resolved(path: str) -> str:
        return str(resolve_location(path)) if path else path

    def resolved_source(path: str) -> str:  # which may be any URL that fsspec knows
        is_local = path and not (is_url(path) or is_generated(path))
        return str(resolve_path(path)) if is_local else path

    def resolved_sources[T: SourceConfig](sources: Mapping[str, T]) -> dict[str, T]:
        return {
            name: dataclasses.replace(source, path=resolved_source(source.path))
            for name, source in sources.items()
        }

    data = dataclasses.replace(
        config.data,
        path=resolved_source(config.data.path),
        tokenizer=resolved(config.data.tokenizer),
        chat_template=resolved(config.data.chat_template),
        sources=resolved_sources(config.data.sources),
        validation=resolved_sources(config.data.validation),
    )
    return dataclasses.replace(
        config,
        output=resolved(config.output),
        init_from=resolved(config.init_from),
        distill=dataclasses.replace(config.distill, teacher=resolved(config.distill.teacher)),
        data=data,
    )


def run_defaults(args: Sequence[str]) -> RunConfig:
    """The run of a command line's `--config` and model, before its fields are overridden.

    The model is that of `--init-from` or, for commands that have it, of `--preset`; without them,
    that of the config's `init_from`.

    Raises:
      HymbaError: one of them cannot be read, several name a model, or an option is of a source of
        data that the config lacks.
    """
    named = _named(args)
    base = RunConfig()
    if init_from := _init_from(named):
        base = _started_from(init_from)
    if named.preset:
        if others := [*_models(named)][1:]:
            raise HymbaError(f"--preset {named.preset} and {others[0]} both name a model: drop one")
        base = RunConfig(model=find_preset(named.preset))
    run = base if named.config is None else RunConfig.from_toml(named.config, base)
    _check_sources(args, run.data)
    return run


def _check_sources(args: Sequence[str], data: DataConfig) -> None:
    """Raises HymbaError if an option is of a source that the config does not have."""
    for option in filter(None, map(_OF_SOURCE.match, args)):
        table, name = option.groups()
        names = [known.replace("_", "-") for known in getattr(data, table)]
        if name.replace("_", "-") not in names:
            raise HymbaError(
                f"{option.string}: the config has no source {name}: add a table "
                f"[data.{table}.{name}] to the file that --config names"
            )


def names_model(args: Sequence[str]) -> bool:
    """Whether a command line says what model its run has, if only by a field of it.

    Raises:
      HymbaError: its config cannot be read.
    """
    return any(_models(_named(args))) or any(arg.startswith("--model.") for arg in args)


def _named(args: Sequence[str]) -> argparse.Namespace:
    """The files and models that a command line names."""
    peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    peek.add_argument("--config")
    peek.add_argument("--preset")
    peek.add_argument("--init-from", "--init_from")  # tyro takes both
    return peek.parse_known_args(args)[0]


def _models(named: argparse.Namespace) -> Iterator[str]:
    """What names the model of a run, in words."""
    if named.preset:
        yield f"--preset {named.preset}"
    if named.init_from:
        yield f"--init-from {named.init_from}"
    table = _table(named)
    if "model" in table:
        yield f"[model] of {named.config}"
    elif table.get("init_from") and not named.preset:
        yield f"init_from of {named.config}"


def _init_from(named: argparse.Namespace) -> str:
    """The directory whose model is the default of a command line; empty if there is none.

    That of a config which has every field of a model, as a run's has, is not needed.
    """
    table = _table(named)
    in_file, model = table.get("init_from"), table.get("model")
    is_whole = isinstance(model, dict) and {f.name for f in fields(HymbaConfig)} <= model.keys()
    is_default = isinstance(in_file, str) and not is_whole and not named.preset
    return str(named.init_from or (in_file if is_default else ""))


def _table(named: argparse.Namespace) -> dict[str, Any]:
    """The fields of a command line's config, which are not checked yet."""
    return read_toml(resolve_location(named.config)) if named.config is not None else {}


def _started_from(directory: str) -> RunConfig:
    """A run with the model of a directory and, if it has one, the tokenizer."""
    try:
        model, data = read_config(directory), DataConfig()
    except HymbaError as error:
        raise HymbaError(
            f"{error}; a run that has begun resumes without it, by --config OUTPUT/config.toml"
        ) from error
    data = dataclasses.replace(data, sequence_length=min(data.sequence_length, model.max_positions))
    if (resolve_location(directory) / "tokenizer.json").is_file():
        data = dataclasses.replace(data, tokenizer=directory)
    return RunConfig(init_from=directory, model=model, data=data)
