"""The definition of the SSD recurrence: one position after another."""

from typing import Any

import jax
import jax.numpy as jnp

from hymba_jax.ops.documents import Documents
from hymba_jax.types import Array, Float


def ssd_reference(
    x: Float[Array, "batch length ssm_heads ssm_head_dim"],
    dt: Float[Array, "batch length ssm_heads"],
    A: Float[Array, "ssm_heads"],
    B: Float[Array, "batch length ssm_groups state"],
    C: Float[Array, "batch length ssm_groups state"],
    D: Float[Array, "ssm_heads"] | None = None,
    dt_bias: Float[Array, "ssm_heads"] | None = None,
    initial_state: Float[Array, "batch ssm_heads ssm_head_dim state"] | None = None,
    documents: Documents | None = None,
) -> tuple[
    Float[Array, "batch length ssm_heads ssm_head_dim"],
    Float[Array, "batch ssm_heads ssm_head_dim state"],
]:
    """`ssd` as in its formula. Float64 inputs are computed in float64."""
    batch, _, heads, head_dim = x.shape
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    inputs, dt, A, B, C = (v.astype(dtype) for v in (x, dt, A, B, C))
    if dt_bias is not None:
        dt = dt + dt_bias.astype(dtype)[None, None]
    delta = jax.nn.softplus(dt)
    # Head h reads group h // (heads / groups).
    B, C = (jnp.repeat(v, heads // v.shape[2], axis=2) for v in (B, C))
    if initial_state is None:
        initial_state = jnp.zeros((batch, heads, head_dim, B.shape[-1]), dtype)
    starts = None if documents is None else documents.starts

    def step(h: Array, at: tuple[Any, ...]) -> tuple[Array, Array]:
        x, delta, B, C, start = at
        if documents is not None:
            h = jnp.where(start[:, None, None, None], documents.state.astype(dtype), h)
        h = jnp.exp(delta * A[None])[..., None, None] * h
        h = h + (delta[..., None] * x)[..., None] * B[:, :, None]
        return h, (h * C[:, :, None]).sum(-1)

    time_major = jax.tree.map(lambda v: jnp.moveaxis(v, 1, 0), (inputs, delta, B, C, starts))
    final_state, y = jax.lax.scan(step, initial_state.astype(dtype), time_major)
    y = jnp.moveaxis(y, 0, 1)
    if D is not None:
        y = y + D.astype(dtype)[None, None, :, None] * inputs
    return y.astype(x.dtype), final_state
