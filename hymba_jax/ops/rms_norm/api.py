"""Chooses an implementation of RMSNorm."""

from functools import partial
from typing import Any

import jax

from hymba_jax.ops.platform import target_platform
from hymba_jax.ops.remat import ACTIVATION, named
from hymba_jax.ops.rms_norm.pallas_gpu import (
    MAX_FEATURES,
    MIN_FEATURES,
    mean_of_norms_pallas_gpu,
    rms_norm_of_residual_pallas_gpu,
)
from hymba_jax.ops.rms_norm.reference import rms_norm_reference
from hymba_jax.parallel.shard_map import Axes, mesh_axes, shard_elements, shard_map
from hymba_jax.types import Array, Float

_ROWS: Axes = ("batch", "length", None)
AXES: dict[str, Axes] = {"x": _ROWS, "other": _ROWS, "scale": (None,), "other_scale": (None,)}


@jax.named_scope("norm")
def rms_norm(
    x: Float[Array, "*leading features"],
    scale: Float[Array, "*heads features"],
    *,
    eps: float,
    axis: str | None = None,
) -> Float[Array, "*leading features"]:
    """x / rms(x) * scale over the last axis, in x's dtype; the mean square in float32.

    Args:
      scale: (features,), or (heads, features) for a norm per head.
      eps: added to the mean square.
      axis: the logical axis of x's features; None where they are whole on each device.
    """
    if _takes_kernel(x, scale, axis):
        return _on_shards(mean_of_norms_pallas_gpu, _ROWS, eps, x=x, scale=scale)
    return named(ACTIVATION, rms_norm_reference(x, scale, eps))


@jax.named_scope("norm")
def rms_norm_of_residual(
    x: Float[Array, "batch length features"], scale: Float[Array, "features"], *, eps: float
) -> tuple[Float[Array, "batch length features"], Float[Array, "batch length features"]]:
    """x and its `rms_norm`, where x goes on as a residual stream: one op, as both of its gradients
    are added in one pass."""
    if _takes_kernel(x, scale, None):
        function = rms_norm_of_residual_pallas_gpu
        return _on_shards(function, (_ROWS, _ROWS), eps, x=x, scale=scale)
    return x, named(ACTIVATION, rms_norm_reference(x, scale, eps))


@jax.named_scope("norm")
def mean_of_norms(
    x: Float[Array, "*leading features"],
    other: Float[Array, "*leading features"],
    scale: Float[Array, "features"],
    other_scale: Float[Array, "features"],
    *,
    eps: float,
    axis: str | None = None,
) -> Float[Array, "*leading features"]:
    """The mean of two inputs' `rms_norm`."""
    if _takes_kernel(x, scale, axis):
        arrays = {"x": x, "other": other, "scale": scale, "other_scale": other_scale}
        return _on_shards(mean_of_norms_pallas_gpu, _ROWS, eps, **arrays)
    terms = rms_norm_reference(x, scale, eps) + rms_norm_reference(other, other_scale, eps)
    return named(ACTIVATION, terms / 2)


def _takes_kernel(x: Array, scale: Array, axis: str | None) -> bool:
    """XLA computes a norm of few features, and one of each head, in one pass by itself."""
    return (
        target_platform().endswith("gpu")
        and x.ndim == 3
        and scale.ndim == 1
        and MIN_FEATURES <= x.shape[-1] <= MAX_FEATURES
        and shard_elements(x, _ROWS) < 2**31  # indices are 32 bits
        and not (axis and mesh_axes(axis, x.shape[-1]))
    )


def _on_shards(function: Any, out_axes: Any, eps: float, **arrays: Array) -> Any:
    return shard_map(partial(function, eps=eps), AXES, out_axes, **arrays)
