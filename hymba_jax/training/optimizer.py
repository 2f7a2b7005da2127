"""AdamW (arXiv 1711.05101) on the warmup-stable-decay schedule (arXiv 2404.06395)."""

from collections.abc import Callable
from typing import Any

import jax
import optax

from hymba_jax.training.config import TrainingConfig

# What a matrix product multiplies by: the kernels of linear maps, and the embedding, which is the
# output projection too. Not matrices, whatever their shape: norms, biases, A_log and D, the meta
# tokens (a bias of the first positions) and the convolution's taps (a short vector a channel).
MATRICES = {"kernel", "embedding"}


def is_matrix(path: tuple[Any, ...], _param: Any) -> bool:
    """Whether the parameter at this path of a tree of dictionaries is a matrix, and so decays."""
    return path[-1].key in MATRICES


def learning_rate_schedule(config: TrainingConfig) -> Callable[[Any], Any]:
    """The learning rate of the update after `count` updates.

    It rises linearly to its full value at the end of the warm-up, stays, and falls linearly to
    its least value at the last update.
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


def make_optimizer(config: TrainingConfig) -> optax.GradientTransformation:
    """Clips the gradient's norm, then AdamW that decays matrices only."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            learning_rate_schedule(config),
            b1=config.beta1,
            b2=config.beta2,
            weight_decay=config.weight_decay,
            mask=lambda params: jax.tree.map_with_path(is_matrix, params),
        ),
    )
