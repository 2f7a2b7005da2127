"""Stages of training: parts of one run, each with its own data, shapes and schedule.

A stage is the config of the run with some fields replaced, so what works for a run works for it:

    [[stages]]
    name = "extension"
    steps = 1000
    sequence_length = 8192
    max_positions = 8192  # for which `model.attention.rope_type` "auto" chooses the "ntk" base
    schedule = "linear"
    sources.books.weight = 1
"""

import dataclasses
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hymba_jax.config.data import Packing
from hymba_jax.config.distill import NO_DISTILLATION
from hymba_jax.config.dpo import NO_DPO
from hymba_jax.config.field_types import INT64, Bounds, bound_problems
from hymba_jax.config.model import RopeType
from hymba_jax.config.training import ObjectiveName, Schedule, TrainingConfig
from hymba_jax.errors import HymbaError

if TYPE_CHECKING:
    from hymba_jax.config.run import RunConfig

_BOUNDS = {"tokens": Bounds(1, INT64 - 1, "TOML has no such integer")}


@dataclass(frozen=True)
class StageSourceConfig:
    """A source of `[data.sources.NAME]` in a stage, which has `weight` over the sum of all."""

    weight: float = 1.0


@dataclass(frozen=True)
class StageConfig:
    """What a stage has of its own; all else is the run's.

    Attributes:
      steps: number of optimizer updates.
      tokens: the length in tokens instead, rounded up to whole steps.
      objective: as in `[training]`.
      batch_size: as in `[training]`.
      gradient_accumulation_steps: as in `[training]`.
      schedule: as in `[training]`, over the steps of the stage.
      learning_rate: as in `[training]`.
      min_learning_rate: as in `[training]`.
      warmup_fraction: as in `[training]`, of the steps of the stage. The warm-up rises from the
        last learning rate of the stage before.
      warmup_steps: that number of steps instead.
      decay_fraction: as in `[training]`, of the steps of the stage.
      decay_steps: that number of steps instead.
      validate_every: as in `[training]`.
      validate_on: as in `[training]`.
      sequence_length: as in `[data]`.
      packing: as in `[data]`.
      sources: the sources that are read, by name; if there are none, all with the weights they have
        in `[data.sources]`.
      max_positions: as in `[model]`.
      rope_type: as in `[model.attention]`.
      rope_theta: as in `[model.attention]`.
    """

    steps: int | None = None
    tokens: int | None = None
    objective: ObjectiveName | None = None
    batch_size: int | None = None
    gradient_accumulation_steps: int | None = None
    schedule: Schedule | None = None
    learning_rate: float | None = None
    min_learning_rate: float | None = None
    warmup_fraction: float | None = None
    warmup_steps: int | None = None
    decay_fraction: float | None = None
    decay_steps: int | None = None
    validate_every: int | None = None
    validate_on: tuple[str, ...] | None = None
    sequence_length: int | None = None
    packing: Packing | None = None
    max_positions: int | None = None
    rope_type: RopeType | None = None
    rope_theta: float | None = None
    sources: Mapping[str, StageSourceConfig] = field(default_factory=dict)


@dataclass(frozen=True)
class Stage:
    """A stage as it is trained.

    Attributes:
      name: empty if the run has no stages, and so is one itself.
      start: steps of the run before its first.
      tokens_before: tokens of the run before them.
      run: the config of a run that has this stage only.
    """

    name: str
    start: int
    tokens_before: int
    run: "RunConfig"

    @property
    def stop(self) -> int:
        """Steps of the run after its last."""
        return self.start + self.run.training.steps

    @property
    def decay_start(self) -> int | None:
        """Steps of the run before its learning rate begins to fall; None if it never does."""
        training = self.run.training
        _, decay = training.phase_steps
        if not decay or training.min_learning_rate == training.learning_rate:
            return None
        return self.stop - decay

    @property
    def tokens_per_step(self) -> int:
        return self.run.training.batch_size * self.run.data.sequence_length

    @property
    def tokens(self) -> int:
        return self.run.training.steps * self.tokens_per_step

    @property
    def compiled_for(self) -> tuple[Hashable, ...]:
        """What its compiled steps depend on: stages that agree in it share them."""
        training, data = self.run.training, self.run.data
        sizes = training.batch_size, training.micro_batch_size, data.sequence_length
        return (self.run.model, *sizes, data.packing, training.objective)

    @property
    def validated_on(self) -> tuple[Hashable, ...]:
        """The length of the sequences that validation samples, the objective, and the sources.

        Losses of stages that agree in it can be compared. Those of DPO are relative to the model
        that the stage began with.
        """
        run, training = self.run, self.run.training
        has_reference = training.objective == "dpo" and run.dpo.has_reference
        return (
            run.data.sequence_length,
            training.objective,
            frozenset(training.validate_on),
            self.start if has_reference else None,
        )

    @property
    def shares(self) -> dict[str, float]:
        """The share of its sequences that each source has."""
        weights = {name: each.weight for name, each in self.run.data.train_sources.items()}
        return {name: weight / sum(weights.values()) for name, weight in weights.items() if weight}

    def describe(self) -> str:
        """Its steps, data and learning rate, in words."""
        training, (warmup, decay) = self.run.training, self.run.training.phase_steps
        shares = (f"{name} {share:.3g}" for name, share in self.shares.items())
        phases = [f"warm-up {warmup:,}"] * bool(warmup) + [f"decay {decay:,}"] * bool(decay)
        objective = f"{training.objective}, " if training.objective != "next_token" else ""
        falls = f" to {training.min_learning_rate:g}" if decay else ""
        return (
            f"{self.label}: {objective}steps {self.start + 1:,} to {self.stop:,}, "
            f"{self.tokens:,} tokens; {training.batch_size:,} sequences of "
            f"{self.run.data.sequence_length:,}, {', '.join(shares)}; learning rate "
            f"{training.learning_rate:g}{falls}, {', '.join([training.schedule, *phases])}"
        )

    @property
    def label(self) -> str:
        """What messages call it."""
        return f"stage {self.name}" if self.name else "the run"


def resolve_stages(run: "RunConfig") -> tuple[Stage, ...]:
    """The stages of a run, in order; the run itself if it has none.

    Raises:
      HymbaError: one is invalid.
    """
    if not run.stages:
        return (Stage("", 0, 0, run),)
    stages: list[Stage] = []
    start = tokens = 0
    for name, config in run.stages.items():
        try:
            stage = Stage(name, start, tokens, _resolve(run, config))
        except HymbaError as error:
            raise HymbaError(f"stages.{name}: {error}") from error
        stages.append(stage)
        start, tokens = stage.stop, tokens + stage.tokens
    return tuple(stages)


# Fields of which only one is set.
_ALTERNATIVES = (("warmup_fraction", "warmup_steps"), ("decay_fraction", "decay_steps"))
SCHEDULE_SETTINGS = ("schedule", "learning_rate", "min_learning_rate", *sum(_ALTERNATIVES, ()))
"""Settings of training that decide the learning rate over the steps of a stage."""

_TRAINING = (
    *("objective", "steps", "batch_size", "gradient_accumulation_steps"),
    *("validate_every", "validate_on", *SCHEDULE_SETTINGS),
)
_DATA = ("sequence_length", "packing")
_MODEL = ("max_positions",)
_ATTENTION = ("rope_type", "rope_theta")

OWN_SETTINGS = frozenset(
    f"{part}.{name}"
    for part, names in (("data", _DATA), ("model", _MODEL), ("model.attention", _ATTENTION))
    for name in names
)
"""Settings of data and model that a stage may have of its own, beside the weights of sources."""


def _resolve(run: "RunConfig", stage: StageConfig) -> "RunConfig":
    """The config of a run that has this stage only."""
    if problems := [*_problems(run, stage)]:
        raise HymbaError("; ".join(problems))
    training: dict[str, Any] = _given(stage, *_TRAINING)
    for names in _ALTERNATIVES:
        if any(name in training for name in names):
            training = dict.fromkeys(names) | training
    if training.get("schedule", "wsd") != "wsd":
        training = dict.fromkeys(("decay_fraction", "decay_steps")) | training
    if training.get("schedule", run.training.schedule) == "constant":  # is what others end at
        training = {"min_learning_rate": TrainingConfig.min_learning_rate} | training
    data: dict[str, Any] = _given(stage, *_DATA)
    if stage.sources:
        data["sources"] = {
            name: dataclasses.replace(source, weight=_weight(stage, name))
            for name, source in run.data.sources.items()
        }
    attention = dataclasses.replace(run.model.attention, **_given(stage, *_ATTENTION))
    model = dataclasses.replace(run.model, attention=attention, **_given(stage, *_MODEL))
    if stage.tokens is not None:
        batch = training.get("batch_size", run.training.batch_size)
        length = data.get("sequence_length", run.data.sequence_length)
        if batch * length > 0:  # or the configs below refuse one of them
            training["steps"] = -(-stage.tokens // (batch * length))
    objective = training.get("objective", run.training.objective)
    return dataclasses.replace(
        run,
        stages={},
        dpo=run.dpo if objective == "dpo" else NO_DPO,
        distill=run.distill if objective == "distill" else NO_DISTILLATION,
        model=model,
        data=dataclasses.replace(run.data, **data),
        training=dataclasses.replace(run.training, **training),
    )


def _given(stage: StageConfig, *names: str) -> dict[str, Any]:
    """Those of the fields that the stage has."""
    return {name: value for name in names if (value := getattr(stage, name)) is not None}


def _weight(stage: StageConfig, name: str) -> float:
    return stage.sources[name].weight if name in stage.sources else 0.0


def _problems(run: "RunConfig", stage: StageConfig) -> Iterator[str]:
    yield from bound_problems(stage, _BOUNDS)
    if (stage.steps is None) == (stage.tokens is None):
        yield "set its length, either steps or tokens"
    for name in stage.sources:
        if name not in run.data.sources:
            there = ", ".join(run.data.sources) or "none"
            yield f"sources.{name}: is not among [data.sources.NAME], there are {there}"


def _replaces(run: "RunConfig", stage: StageConfig, name: str) -> bool:
    """Whether a stage does not use the run's value of a field of training or data."""
    if name == "steps":
        return True
    schedule = stage.schedule or run.training.schedule
    if name.startswith("decay_") and schedule != "wsd":
        return True
    if name == "min_learning_rate" and schedule == "constant":
        return True
    same = next((pair for pair in _ALTERNATIVES if name in pair), (name,))
    return bool(_given(stage, *same))


def ineffective_fields(run: "RunConfig") -> Iterator[str]:
    """The fields of a run with stages that each of them replaces, though they are set."""
    for part, names in (("training", _TRAINING), ("data", _DATA)):
        config = getattr(run, part)
        default = type(config)()
        for name in names:
            if getattr(config, name) != getattr(default, name) and all(
                _replaces(run, stage, name) for stage in run.stages.values()
            ):
                yield (
                    f"{part}.{name} has no effect, as every stage sets its own or uses none: "
                    "remove it"
                )
    if all(stage.sources for stage in run.stages.values()):
        for name, source in run.data.sources.items():
            if source.weight != type(source).weight:
                yield (
                    f"data.sources.{name}.weight has no effect, as every stage sets its own: "
                    "remove it"
                )
