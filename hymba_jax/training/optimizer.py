"""AdamW (arXiv 1711.05101)."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from hymba_jax.config.training import TrainingConfig
from hymba_jax.training.schedule import learning_rate_schedule
from hymba_jax.types import Array, Float

# The weights of matmuls: the kernels of linear maps, and the embedding, which is the
# output projection too. Not matrices, whatever their shape: norms, biases, A_log and D, the meta
# tokens (a bias of the first positions) and the convolution's taps (a short vector a channel).
MATRICES = {"kernel", "embedding"}


def is_matrix(path: tuple[Any, ...], _param: Any) -> bool:
    """Whether the parameter at this path of a tree of dictionaries is a matrix, i.e. has weight
    decay."""
    return path[-1].key in MATRICES


def make_optimizer(
    config: TrainingConfig, schedule: optax.Schedule | None = None
) -> optax.GradientTransformation:
    """Clips the gradient's norm, then AdamW that decays matrices only.

    Its state has the learning rate of the last update, for `applied_learning_rate`.

    Args:
      schedule: the learning rate of the update after so many; the config's own if absent.
    """
    scale = optax.inject_hyperparams(optax.scale_by_learning_rate, hyperparam_dtype=jnp.float32)
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.scale_by_adam(config.beta1, config.beta2),
        optax.add_decayed_weights(
            config.weight_decay, lambda params: jax.tree.map_with_path(is_matrix, params)
        ),
        scale(schedule or learning_rate_schedule([config])),
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
