"""AdamW (arXiv 1711.05101) on the warmup-stable-decay schedule (arXiv 2404.06395)."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from hymba_jax.config.training import TrainingConfig
from hymba_jax.types import Array, Float

# The weights of matmuls: the kernels of linear maps, and the embedding, which is the
# output projection too. Not matrices, whatever their shape: norms, biases, A_log and D, the meta
# tokens (a bias of the first positions) and the convolution's taps (a short vector a channel).
MATRICES = {"kernel", "embedding"}


def is_matrix(path: tuple[Any, ...], _param: Any) -> bool:
    """Whether the parameter at this path of a tree of dictionaries is a matrix, i.e. has weight
    decay."""
    return path[-1].key in MATRICES


def learning_rate_schedule(config: TrainingConfig) -> Callable[[Any], Any]:
    """The learning rate of the update after `count` updates.

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


def make_optimizer(config: TrainingConfig) -> optax.GradientTransformation:
    """Clips the gradient's norm, then AdamW that decays matrices only.

    Its state has the learning rate of the last update, for `applied_learning_rate`.
    """
    scale = optax.inject_hyperparams(optax.scale_by_learning_rate, hyperparam_dtype=jnp.float32)
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.scale_by_adam(config.beta1, config.beta2),
        optax.add_decayed_weights(
            config.weight_decay, lambda params: jax.tree.map_with_path(is_matrix, params)
        ),
        scale(learning_rate_schedule(config)),
    )


def applied_learning_rate(state: optax.OptState) -> Float[Array, ""] | None:
    """The learning rate of the update that led to this state of an optimizer.

    None where the state does not have it (`optax.inject_hyperparams` puts it there), or has
    several.
    """
    found = optax.tree.get_all_with_path(
        state, "learning_rate", lambda _, value: isinstance(value, jax.Array)
    )
    rates = [rate for _, rate in found]
    return rates[0] if len(rates) == 1 else None
