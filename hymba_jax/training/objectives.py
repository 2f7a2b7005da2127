"""The objectives that a config can name."""

from collections.abc import Mapping
from functools import partial

from hymba_jax.config.run import RunConfig
from hymba_jax.config.stages import Stage
from hymba_jax.data import Data, Formats
from hymba_jax.errors import HymbaError
from hymba_jax.training.distillation import distillation_loss
from hymba_jax.training.loss import Objective, next_token_loss
from hymba_jax.training.preference import preference_loss


def objective_of(run: RunConfig) -> Objective:
    """What a run without stages minimizes."""
    if run.training.objective == "dpo":
        return partial(preference_loss, dpo=run.dpo)
    if run.training.objective == "distill":
        return partial(
            distillation_loss, temperature=run.distill.temperature, weight=run.distill.weight
        )
    return next_token_loss


def has_reference(run: RunConfig) -> bool:
    """Whether the objective compares the model with itself before the first step."""
    return run.training.objective == "dpo" and run.dpo.has_reference


def check_formats(stage: Stage, formats: Formats) -> None:
    """Raises HymbaError if the objective of a stage is not for records such as its sources have."""
    objective = stage.run.training.objective
    is_dpo = objective == "dpo"
    for name in stage.shares:
        if (formats.train[name] == "preference") != is_dpo:
            problem = (
                'no pairs, which it is for: give it some (format "preference"), or set another'
                if is_dpo
                else 'pairs, which are for objective "dpo" alone: set training.objective'
            )
            source = f"data.sources.{name}" if stage.run.data.sources else "data.path"
            raise HymbaError(f"{stage.label}: objective is {objective}, and {source} has {problem}")
    held_out = formats.validation or formats.train
    _check_validated(stage, {name: each == "preference" for name, each in held_out.items()})


def check_objective(stage: Stage, data: Data) -> None:
    """Raises HymbaError if the objective of a stage does not go with its validation."""
    _check_validated(stage, {name: each.is_preference for name, each in data.validation.items()})


def _check_validated(stage: Stage, has_pairs: Mapping[str, bool]) -> None:
    """Raises HymbaError unless a source of validation has what the objective of a stage is for."""
    is_dpo = stage.run.training.objective == "dpo"
    what = "pairs" if is_dpo else "documents but pairs"
    if chosen := stage.run.training.validate_on:
        if is_dpo not in (has_pairs[name] for name in chosen if name in has_pairs):
            raise HymbaError(
                f"{stage.label}: training.validate_on names no source of validation {what}: "
                f"{', '.join(chosen)}"
            )
    elif is_dpo not in has_pairs.values():
        raise HymbaError(
            f"{stage.label}: there are no validation {what}: name some in [data.validation.NAME], "
            "or hold out a larger validation_fraction"
        )
