"""Padding of a batch, for implementations of the scan that do not know of it."""

import jax.numpy as jnp

from hymba_jax.types import Array, Bool, Float


def mask_padding(
    valid: Bool[Array, "*positions"],
    x: Float[Array, "*positions channels"],
    dt: Float[Array, "*positions channels"],
    B: Float[Array, "*positions state"],
    C: Float[Array, "*positions state"],
    z: Float[Array, "*positions channels"] | None,
) -> tuple[Array, Array, Array, Array, Array | None]:
    """The same inputs, such that padding has y = 0 and leaves the state unchanged.

    Its time step is softplus(-inf) = 0, and what it holds reaches no gradient.
    """
    valid = valid[..., None]
    x, B, C = (jnp.where(valid, v, 0) for v in (x, B, C))
    dt = jnp.where(valid, dt, -jnp.inf)
    return x, dt, B, C, None if z is None else jnp.where(valid, z, 0)
