"""Learning rates: a schedule is one function here, and a name of `config.training.Schedule`.

A stage begins with a linear warm-up from the rate at which the one before it ended, 0 for the
first. The rate jumps only where a stage has no warm-up: if it says so, or if it is so short that
its fraction of the steps rounds to none.
"""

from collections.abc import Callable, Mapping, Sequence

import optax

from hymba_jax.config.run import RunConfig
from hymba_jax.config.training import Schedule, TrainingConfig


def _constant(config: TrainingConfig) -> optax.Schedule:
    return optax.schedules.constant_schedule(config.learning_rate)


def _linear(config: TrainingConfig) -> optax.Schedule:
    _, decay = config.phase_steps
    return optax.schedules.linear_schedule(
        config.learning_rate, config.min_learning_rate, max(decay, 1)
    )


def _cosine(config: TrainingConfig) -> optax.Schedule:
    """Half a period of a cosine (arXiv 1608.03983)."""
    _, decay = config.phase_steps
    least = config.min_learning_rate / config.learning_rate
    return optax.schedules.cosine_decay_schedule(config.learning_rate, max(decay, 1), least)


def _wsd(config: TrainingConfig) -> optax.Schedule:
    """Warmup, stable, decay (arXiv 2404.06395), after its warm-up."""
    warmup, decay = config.phase_steps
    return optax.schedules.join_schedules(
        [_constant(config), _linear(config)], [config.steps - decay - warmup]
    )


SCHEDULES: Mapping[Schedule, Callable[[TrainingConfig], optax.Schedule]] = {
    "wsd": _wsd,
    "constant": _constant,
    "linear": _linear,
    "cosine": _cosine,
}
"""The rate of the update that is so many behind the last of the warm-up."""


def learning_rate_schedule(stages: Sequence[TrainingConfig]) -> optax.Schedule:
    """The learning rate of the update after `count` updates, through stages one after another."""
    schedules, starts = [], [0]
    rate = 0.0
    for config in stages:
        schedules.append(_stage_schedule(config, rate))
        starts.append(starts[-1] + config.steps)
        rate = _last_rate(config)
    return optax.schedules.join_schedules(schedules, starts[1:-1])


def run_schedule(run: RunConfig) -> optax.Schedule:
    """The same of a run, through all of its stages."""
    return learning_rate_schedule([stage.run.training for stage in run.resolved_stages])


def _last_rate(config: TrainingConfig) -> float:
    """The learning rate of a stage's last update."""
    _, decay = config.phase_steps
    return config.min_learning_rate if decay else config.learning_rate


def _stage_schedule(config: TrainingConfig, before: float) -> optax.Schedule:
    """The learning rate of a stage's update after `count` of its updates.

    Args:
      before: the rate of the update before its first.
    """
    warmup, _ = config.phase_steps
    rise = optax.schedules.linear_schedule(before, config.learning_rate, max(warmup, 1))
    joined = optax.schedules.join_schedules([rise, SCHEDULES[config.schedule](config)], [warmup])
    return lambda count: joined(count + 1)
