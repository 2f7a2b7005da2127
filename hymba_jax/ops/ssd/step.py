"""One position of the SSD recurrence, for decoding."""

import jax
import jax.numpy as jnp

from hymba_jax.types import Array, Float


def ssd_step(
    x: Float[Array, "batch ssm_heads ssm_head_dim"],
    dt: Float[Array, "batch ssm_heads"],
    A: Float[Array, "ssm_heads"],
    B: Float[Array, "batch ssm_groups state"],
    C: Float[Array, "batch ssm_groups state"],
    D: Float[Array, "ssm_heads"] | None = None,
    dt_bias: Float[Array, "ssm_heads"] | None = None,
    *,
    state: Float[Array, "batch ssm_heads ssm_head_dim state"],
) -> tuple[
    Float[Array, "batch ssm_heads ssm_head_dim"],
    Float[Array, "batch ssm_heads ssm_head_dim state"],
]:
    """`ssd` of one position, with constant time and memory.

    Args:
      x, dt, A, B, C, D, dt_bias: as there, without the length.
      state: the state after the position before.

    Returns:
      y in x's dtype and the state after this position in float32.
    """
    inputs, dt, A, B, C, h = (v.astype(jnp.float32) for v in (x, dt, A, B, C, state))
    if dt_bias is not None:
        dt = dt + dt_bias.astype(jnp.float32)[None]
    delta = jax.nn.softplus(dt)
    B, C = (jnp.repeat(v, x.shape[1] // v.shape[1], axis=1) for v in (B, C))
    h = jnp.exp(delta * A[None])[..., None, None] * h
    h = h + (delta[..., None] * inputs)[..., None] * B[:, :, None]
    y = (h * C[:, :, None]).sum(-1)
    if D is not None:
        y = y + D.astype(jnp.float32)[None, :, None] * inputs
    return y.astype(x.dtype), h


def ssd_single(
    x: Float[Array, "batch 1 ssm_heads ssm_head_dim"],
    dt: Float[Array, "batch 1 ssm_heads"],
    A: Float[Array, "ssm_heads"],
    B: Float[Array, "batch 1 ssm_groups state"],
    C: Float[Array, "batch 1 ssm_groups state"],
    D: Float[Array, "ssm_heads"] | None = None,
    dt_bias: Float[Array, "ssm_heads"] | None = None,
    initial_state: Float[Array, "batch ssm_heads ssm_head_dim state"] | None = None,
) -> tuple[
    Float[Array, "batch 1 ssm_heads ssm_head_dim"],
    Float[Array, "batch ssm_heads ssm_head_dim state"],
]:
    """`ssd` of a sequence of length 1: the step, and no loop around it."""
    batch, _, heads, head_dim = x.shape
    state = initial_state
    if state is None:
        state = jnp.zeros((batch, heads, head_dim, B.shape[-1]), jnp.float32)
    y, state = ssd_step(x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], D, dt_bias, state=state)
    return y[:, None], state
