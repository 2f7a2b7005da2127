"""RMSNorm by its formula."""

import jax.numpy as jnp
from jax import lax

from hymba_jax.ops.remat import NORM, named
from hymba_jax.types import Array, Float


def rms_norm_reference(
    x: Float[Array, "*leading features"], scale: Float[Array, "*heads features"], eps: float
) -> Float[Array, "*leading features"]:
    """x / rms(x) * scale over the last axis; the mean square in float32."""
    x32 = x.astype(jnp.float32)
    mean_square = named(NORM, jnp.mean(jnp.square(x32), axis=-1, keepdims=True))
    normed = (x32 * lax.rsqrt(mean_square + eps)).astype(x.dtype)
    # Broadcast in float32, in which its gradient is summed.
    return normed * jnp.broadcast_to(scale.astype(jnp.float32), x.shape).astype(x.dtype)
