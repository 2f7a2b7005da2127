"""The definition of the selective scan: one position after another."""

from typing import Any

import jax
import jax.numpy as jnp

from hymba_jax.ops.documents import Documents
from hymba_jax.types import Array, Float


def selective_scan_reference(
    x: Float[Array, "batch length channels"],
    dt: Float[Array, "batch length channels"],
    A: Float[Array, "state channels"],
    B: Float[Array, "batch length state"],
    C: Float[Array, "batch length state"],
    D: Float[Array, "channels"] | None = None,
    z: Float[Array, "batch length channels"] | None = None,
    dt_bias: Float[Array, "channels"] | None = None,
    initial_state: Float[Array, "batch state channels"] | None = None,
    documents: Documents | None = None,
) -> tuple[Float[Array, "batch length channels"], Float[Array, "batch state channels"]]:
    """`selective_scan` as in its formula. Float64 inputs are computed in float64."""
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    inputs, dt, A, B, C = (v.astype(dtype) for v in (x, dt, A, B, C))
    if dt_bias is not None:
        dt = dt + dt_bias.astype(dtype)[None, None]
    delta = jax.nn.softplus(dt)
    if initial_state is None:
        initial_state = jnp.zeros((x.shape[0], *A.shape), dtype)
    starts = None if documents is None else documents.starts

    def step(h: Array, at: tuple[Any, ...]) -> tuple[Array, Array]:
        x, delta, B, C, start = at
        if documents is not None:
            h = jnp.where(start[:, None, None], documents.state.astype(dtype), h)
        decay = jnp.exp(delta[:, None] * A[None])
        h = decay * h + (delta * x)[:, None] * B[:, :, None]
        return h, (h * C[:, :, None]).sum(1)

    time_major = jax.tree.map(lambda v: jnp.moveaxis(v, 1, 0), (inputs, delta, B, C, starts))
    final_state, y = jax.lax.scan(step, initial_state.astype(dtype), time_major)
    y = jnp.moveaxis(y, 0, 1)

    if D is not None:
        y = y + D.astype(dtype)[None, None] * inputs
    if z is not None:
        y = y * jax.nn.silu(z.astype(dtype))
    return y.astype(x.dtype), final_state
