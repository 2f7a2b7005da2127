"""Copies of the parameters in an optimizer's state: float32 master weights, and their average."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from hymba_jax.model.abstract import Params
from hymba_jax.types import Array, Int


class MasterWeights(NamedTuple):
    """State of `with_master_weights`; `weights` has None for parameters in float32."""

    weights: Params
    optimizer: optax.OptState


def with_master_weights(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """The same optimizer, updating float32 copies of parameters in other dtypes.

    Such parameters are their copies rounded, so that updates below their precision are not lost
    (arXiv 1710.03740, section 3.1).
    """

    def init(params: Params) -> MasterWeights:
        weights = jax.tree.map(lambda p: None if _is_float32(p) else p.astype(jnp.float32), params)
        return MasterWeights(weights, optimizer.init(_masters(params, weights)))

    def update(grads: Params, state: MasterWeights, params: Params) -> tuple[Params, MasterWeights]:
        masters = _masters(params, state.weights)
        updates, inner = optimizer.update(grads, state.optimizer, masters)
        masters = optax.apply_updates(masters, updates)
        weights = jax.tree.map(lambda p, m: None if _is_float32(p) else m, params, masters)
        return jax.tree.map(_to_rounded, params, masters, updates), MasterWeights(weights, inner)

    return optax.GradientTransformation(init, update)


def _is_float32(param: Array) -> bool:
    return bool(param.dtype == jnp.float32)


def _masters(params: Params, weights: Params) -> Params:
    return jax.tree.map(lambda p, weight: p if weight is None else weight, params, weights)


def _to_rounded(param: Array, master: Array, update: Array) -> Array:
    """The update that makes a parameter its master weight, rounded."""
    if _is_float32(param):
        return update
    return master.astype(param.dtype).astype(jnp.float32) - param.astype(jnp.float32)


class EMA(NamedTuple):
    """State of `with_ema`; `ema` are parameters in float32."""

    count: Int[Array, ""]  # type: ignore[assignment]
    ema: Params
    optimizer: optax.OptState


def with_ema(optimizer: optax.GradientTransformation, decay: float) -> optax.GradientTransformation:
    """The same optimizer, whose state has an exponential moving average of the parameters.

    After update t those of update i have the weight decay^(t - i), normalized to a sum of 1: the
    initial parameters have none.
    """

    def init(params: Params) -> EMA:
        return EMA(jnp.int32(0), optax.tree.zeros_like(params, jnp.float32), optimizer.init(params))

    def update(grads: Params, state: EMA, params: Params) -> tuple[Params, EMA]:
        updates, inner = optimizer.update(grads, state.optimizer, params)
        count = state.count + 1
        # (1 - decay) / (1 - decay^t), without cancellation
        newest = (1 - decay) / -jnp.expm1(count * math.log(decay))
        ema = optax.incremental_update(optax.apply_updates(params, updates), state.ema, newest)
        return updates, EMA(count, ema, inner)

    return optax.GradientTransformation(init, update)
