"""A whole run as one object, from a TOML file and the command line.

A file holds the fields of `RunConfig` by their names, those of its parts in tables:

    output = "runs/mine"

    [model]
    preset = "hymba-125m"
    max_positions = 2048

    [training]
    steps = 1000

Tables `[[stages]]` divide it into stages that differ in some fields (`config/stages.py`).

Omitted fields have their defaults, or those of the preset if one is named; vocab_size then follows
the run's tokenizer. The command line overrides any field: `--training.steps 100`, or
`--stages.NAME.steps 100`.
"""

import dataclasses
import functools
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from hymba_jax.config.adapter import AdapterConfig
from hymba_jax.config.data import DataConfig
from hymba_jax.config.distill import NO_DISTILLATION, DistillConfig
from hymba_jax.config.dpo import NO_DPO, DPOConfig
from hymba_jax.config.field_types import Bounds, bound_problems, shown, type_problems
from hymba_jax.config.model import PRESETS, ComputeConfig, HymbaConfig
from hymba_jax.config.parallel import ParallelConfig
from hymba_jax.config.stages import Stage, StageConfig, ineffective_fields, resolve_stages
from hymba_jax.config.toml import ARRAY, misfits, name_tables, override_from, toml_lines
from hymba_jax.config.tracking import TrackingConfig
from hymba_jax.config.training import TRAINING_BOUNDS, TrainingConfig
from hymba_jax.errors import HymbaError
from hymba_jax.files import read_toml, resolve_location

CONFIG_FILE = "config.toml"  # inside a run directory

RUN_BOUNDS = {"seed": Bounds(0, 2**32 - 1, "JAX takes 32 bits of it")}


@dataclass(frozen=True)
class RunConfig:
    """All options of a training run.

    Attributes:
      output: the run directory: config, tokenizer, metrics and checkpoints; local, gs:// or s3://.
      seed: random seed of the initial parameters, the order of the data and the sample.
      init_from: directory of a model or a run, local, gs:// or s3://, whose newest parameters
        initialize this run; random if empty. On a command line and in a config file its model and
        tokenizer become the defaults. A run that has begun does not need the directory if it is
        resumed by the config.toml in its output.
      stages: parts of the run by name, in order; none if it is the same throughout.
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
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    dpo: DPOConfig = field(default_factory=DPOConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    stages: Mapping[str, StageConfig] = field(default_factory=dict, metadata=ARRAY)

    def __post_init__(self) -> None:
        problems = [*type_problems(self)] or [*self._value_problems()]
        if problems:
            raise HymbaError("run config: " + "; ".join(problems))

    def _value_problems(self) -> Iterator[str]:
        yield from bound_problems(self, RUN_BOUNDS)
        if not self.output:
            yield "output is empty: name a directory"
        if self.adapter and self.training.freeze:
            yield "training.freeze is set, but an adapter freezes the model: set adapter.train"
        yield from self._objective_problems()
        if self.stages:
            yield from ineffective_fields(self)
            yield from self._stage_problems()
            return
        yield from self.training.stage_problems()
        yield from self.data.packing_problems()
        yield from rotation_problems(self.model, self.data)
        there = self.data.validation or self.data.train_sources
        for name in self.training.validate_on:
            if name not in there:
                yield (
                    f"training.validate_on: {name} is no source of validation, there are "
                    f"{', '.join(there)}"
                )
        if self.data.sequence_length > self.model.max_positions:
            yield (
                f"data.sequence_length {self.data.sequence_length} is longer than "
                f"model.max_positions {self.model.max_positions}"
            )

    def _objective_problems(self) -> Iterator[str]:
        objectives = {self.training.objective, *(s.objective for s in self.stages.values())}
        for name, config, unused in (
            ("dpo", self.dpo, NO_DPO),
            ("distill", self.distill, NO_DISTILLATION),
        ):
            if config != unused and name not in objectives:
                yield (
                    f'[{name}] has no effect without an objective "{name}": set training.objective'
                )
        if "distill" in objectives and not self.distill.teacher:
            yield "objective is distill, and there is no teacher: name one by distill.teacher"
        if "dpo" in objectives and self.dpo.has_reference and self.training.reduction_shards:
            yield (
                "training.reduction_shards has no fixed order for the reference of objective dpo: "
                'leave it out, or set dpo.loss "simpo"'
            )

    def _stage_problems(self) -> Iterator[str]:
        try:
            steps = self.resolved_stages[-1].stop
        except HymbaError as error:
            yield str(error)
        else:
            if steps > TRAINING_BOUNDS["steps"].at_most:
                yield f"the stages have {steps} steps together, above 2147483647"

    @functools.cached_property
    def resolved_stages(self) -> tuple[Stage, ...]:
        """Its stages, each as the run that it is; a run without stages is one itself."""
        return resolve_stages(self)

    def stage_at(self, step: int) -> Stage:
        """The stage of a step, counted from 1; of step 0 the first."""
        stages = self.resolved_stages
        return next((stage for stage in stages if step <= stage.stop), stages[-1])

    def is_checkpoint_due(self, step: int) -> bool:
        """Whether a step has a checkpoint on schedule, as a multiple or the last of a stage.

        Those of interruptions, of the best validations and before decays are others.
        """
        ends = any(step == stage.stop for stage in self.resolved_stages)
        return ends or step % self.training.checkpoint_every == 0

    @property
    def data_of_all_stages(self) -> DataConfig:
        """The data with the sources that any stage reads, which have its weight or another's."""
        if not self.data.sources:
            return self.data
        read = [stage.run.data.sources for stage in self.resolved_stages]
        sources = {
            name: dataclasses.replace(source, weight=max(each[name].weight for each in read))
            for name, source in self.data.sources.items()
        }
        return dataclasses.replace(self.data, sources=sources)

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


def rotation_problems(model: HymbaConfig, data: DataConfig) -> Iterator[str]:
    """Why a model cannot compute packed documents, if it cannot."""
    longest = model.max_fixed_positions - model.num_meta_tokens
    for name in ("packing", "validation_packing"):
        if getattr(data, name) == "documents" and data.sequence_length > longest:
            yield (
                f'rope_type "dynamic_ntk" does not go with data.{name} "documents" in sequences of '
                f"more than {longest} tokens, where rotation depends on the length of a document: "
                f"data.sequence_length is {data.sequence_length}, shorten it, or choose another "
                "rope_type"
            )


def read_table(path: str | os.PathLike[str], base: RunConfig) -> tuple[RunConfig, dict[str, Any]]:
    """The config that a file is based on, and the file's fields, which are checked.

    Raises:
      HymbaError: as for `RunConfig.from_toml`.
    """
    path = resolve_location(path)
    table = read_toml(path)
    preset = table["model"].pop("preset", None) if isinstance(table.get("model"), dict) else None
    if preset is not None:
        if not isinstance(preset, str) or preset not in PRESETS:
            raise HymbaError(
                f"{path}: model.preset is {shown(preset)}, not one of {', '.join(PRESETS)}"
            )
        model = dataclasses.replace(PRESETS[preset], vocab_size="auto")
        base = dataclasses.replace(base, model=model)
    try:
        name_tables(base, table)
    except HymbaError as error:
        raise HymbaError(f"{path}: {error}") from error
    problems = [*misfits(base, table, "")]
    if problems:
        raise HymbaError(f"{path}: " + "; ".join(problems))
    return base, table
