"""The learning rate of each update."""

import optax

from hymba_jax.config.training import TrainingConfig


def make_schedule(config: TrainingConfig) -> optax.Schedule:
    """The warmup-stable-decay schedule (arXiv 2404.06395): updates done -> the next one's rate.

    It rises linearly to its full value at the end of the warm-up, stays, and falls linearly to
    its minimum at the last update.
    """
    rate, least = config.learning_rate, config.min_learning_rate
    warmup, decay = config.warmup_steps, config.decay_steps
    stages = optax.schedules.join_schedules(
        [
            optax.schedules.linear_schedule(0.0, rate, warmup),
            optax.schedules.constant_schedule(rate),
            optax.schedules.linear_schedule(rate, least, decay),
        ],
        boundaries=[warmup, config.steps - decay],
    )
    return lambda count: stages(count + 1)
