"""A whole run as one object, from a TOML file and the command line.

A file holds the fields of `RunConfig` by their names, those of its parts in tables:

    output = "runs/mine"

    [model]
    preset = "hymba-125m"
    max_positions = 2048

    [training]
    steps = 1000

Omitted fields have their defaults, or those of the preset if one is named; vocab_size then follows
the run's tokenizer. The command line overrides any field: `--training.steps 100`.
"""

import dataclasses
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from hymba_jax.config.data import DataConfig
from hymba_jax.config.field_types import Bounds, bound_problems, shown, type_problems
from hymba_jax.config.model import PRESETS, ComputeConfig, HymbaConfig
from hymba_jax.config.parallel import ParallelConfig
from hymba_jax.config.toml import misfits, override_from, toml_lines
from hymba_jax.config.tracking import TrackingConfig
from hymba_jax.config.training import TrainingConfig
from hymba_jax.errors import HymbaError
from hymba_jax.files import read_toml, resolve_path

CONFIG_FILE = "config.toml"  # inside a run directory

RUN_BOUNDS = {"seed": Bounds(0, 2**32 - 1, "JAX takes 32 bits of it")}


@dataclass(frozen=True)
class RunConfig:
    """All options of a training run.

    Attributes:
      output: the run directory: config, tokenizer, metrics and checkpoints.
      seed: random seed of the initial parameters, the order of the data and the sample.
      init_from: directory of a model or a run whose newest parameters initialize this run; random
        if empty. On the command line, its model and tokenizer become the defaults. Ignored when
        resuming.
      profile: traces a few of the first steps, for XProf, into `profile` in the run directory.

    Raises:
      HymbaError: the options contradict each other.
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
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

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
            type (all are named); or the values are invalid.
        """
        base, table = read_table(path, base or cls())
        return override_from(path, base, table)

    def to_toml(self) -> str:
        """The file that `from_toml` reads as this config; every field is in it."""
        return "\n".join(toml_lines(self, "")).lstrip() + "\n"


def read_table(path: str | os.PathLike[str], base: RunConfig) -> tuple[RunConfig, dict[str, Any]]:
    """The config that a file is based on, and the file's fields, which are checked.

    Raises:
      HymbaError: as for `RunConfig.from_toml`.
    """
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
    problems = [*misfits(base, table, "")]
    if problems:
        raise HymbaError(f"{path}: " + "; ".join(problems))
    return base, table
