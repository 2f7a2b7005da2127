"""The objectives that a config can name."""

from functools import partial

from hymba_jax.config.run import RunConfig
from hymba_jax.config.stages import Stage
from hymba_jax.data import Data
from hymba_jax.errors import HymbaError
from hymba_jax.training.distillation import Teacher, check_teacher, distillation_loss
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


def check_objective(stage: Stage, data: Data, teacher: Teacher | None) -> None:
    """Raises HymbaError if the objective of a stage does not go with what it reads."""
    if teacher:
        check_teacher(teacher, data.tokenizer)
    objective = stage.run.training.objective
    is_dpo = objective == "dpo"
    for name in stage.shares:
        if data.train[name].is_preference != is_dpo:
            problem = (
                'no pairs, which it is for: give it some (format "preference"), or set another'
                if is_dpo
                else 'pairs, which are for objective "dpo" alone: set training.objective'
            )
            raise HymbaError(
                f"{stage.label}: objective is {objective}, and data.sources.{name} has {problem}"
            )
    if not data.validated(preferences=is_dpo):
        what = "pairs" if is_dpo else "documents but pairs"
        raise HymbaError(
            f"{stage.label}: there are no validation {what}: name some in [data.validation.NAME], "
            "or hold out a larger validation_fraction"
        )
