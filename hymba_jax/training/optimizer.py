"""The optimizers of `training.optimizer`.

An optimizer is a function from the config to the direction of an update, before weight decay and
the learning rate. To add one, write it, enter it in `DIRECTIONS`, and name it in
`config/training.py`.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from hymba_jax.config.training import OptimizerName, TrainingConfig
from hymba_jax.parallel.mesh import shard_first_axis
from hymba_jax.training.schedule import learning_rate_schedule
from hymba_jax.training.weights import with_ema, with_master_weights
from hymba_jax.types import Array, Float

# The weights of matmuls: the kernels of linear maps, and the embedding, which is the
# output projection too. Not matrices, whatever their shape: norms, biases, A_log and D, the meta
# tokens (a bias of the first positions) and the convolution's taps (a short vector a channel).
MATRICES = {"kernel", "embedding"}


def is_matrix(path: tuple[Any, ...], _param: Any) -> bool:
    """Whether the parameter at this path of a tree of dictionaries is a matrix, i.e. has weight
    decay."""
    return path[-1].key in MATRICES


def is_hidden_matrix(path: tuple[Any, ...]) -> bool:
    """Whether it maps one vector inside the model to another: neither embedding nor output head."""
    return path[-1].key == "kernel" and path[0].key != "lm_head"


def adamw(config: TrainingConfig) -> optax.GradientTransformation:
    """AdamW (arXiv 1711.05101)."""
    return optax.scale_by_adam(config.beta1, config.beta2)


def muon(config: TrainingConfig) -> optax.GradientTransformation:
    """Muon (Jordan, 2024) for every matrix inside the model, and AdamW for the rest.

    The update of a matrix is its momentum, orthogonalized by five Newton-Schulz steps, each matrix
    of stacked layers by itself, and scaled to the root mean square `muon_update_rms`, whatever its
    shape (arXiv 2502.16982, equation 4). At 0.2, about that of AdamW, both work at one learning
    rate and weight decay.
    """

    def direction(momentum: Array, _: Any) -> Array:
        shard = (lambda a: a) if config.reduction_shards else shard_first_axis
        scale = config.muon_update_rms * max(momentum.shape[-2:]) ** 0.5
        return scale * _orthogonal(momentum, shard)

    orthogonalized = optax.chain(
        optax.trace(config.muon_momentum, nesterov=True), optax.stateless_with_tree_map(direction)
    )
    return optax.partition(
        {"muon": orthogonalized, "adamw": adamw(config)},
        lambda params: jax.tree.map_with_path(
            lambda path, _: "muon" if is_hidden_matrix(path) else "adamw", params
        ),
    )


# Without momentum, so that its state need not be kept.
_NEWTON_SCHULZ = optax.contrib.scale_by_muon(
    beta=0.0,
    nesterov=False,
    weight_dimension_numbers=optax.contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=2),
)


def _orthogonal(
    matrices: Float[Array, "*stack inputs outputs"], shard: Callable[[Array], Array]
) -> Array:
    """Each matrix orthogonalized, on one device: they are collected twice, not at every step."""
    several = matrices.reshape(-1, *matrices.shape[-2:])
    sharded = shard(several)
    orthogonal, _ = _NEWTON_SCHULZ.update(sharded, _NEWTON_SCHULZ.init(sharded))
    return orthogonal[: len(several)].reshape(matrices.shape)


DIRECTIONS: dict[OptimizerName, Callable[[TrainingConfig], optax.GradientTransformation]] = {
    "adamw": adamw,
    "muon": muon,
}


def make_optimizer(
    config: TrainingConfig, schedule: optax.Schedule | None = None
) -> optax.GradientTransformation:
    """Clips the gradient's norm, then updates by the config's optimizer; only matrices decay.

    Parameters that are not in float32 have master weights. The state has the learning rate of the
    last update, for `applied_learning_rate`, and the average of the parameters, if wanted.

    Args:
      schedule: updates done -> the learning rate of the next one; the config's own if absent.
    """
    scale = optax.inject_hyperparams(optax.scale_by_learning_rate, hyperparam_dtype=jnp.float32)
    optimizer = optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        DIRECTIONS[config.optimizer](config),
        optax.add_decayed_weights(
            config.weight_decay, lambda params: jax.tree.map_with_path(is_matrix, params)
        ),
        scale(schedule or learning_rate_schedule([config])),
    )
    optimizer = with_master_weights(optimizer)
    return with_ema(optimizer, config.ema_decay) if config.ema_decay else optimizer


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
