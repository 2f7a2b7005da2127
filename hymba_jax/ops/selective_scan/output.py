"""Skip connection and gate after the recurrence, for back ends that do not fuse them."""

import jax

from hymba_jax.types import Array, Float


def skip_and_gate(
    y: Float[Array, "*positions channels"],
    x: Float[Array, "*positions channels"],
    D: Float[Array, "channels"] | None,
    z: Float[Array, "*positions channels"] | None,
) -> Float[Array, "*positions channels"]:
    """(y + D x) silu(z) in float32, as y and x are: x is also used elsewhere, and its gradients are
    summed."""
    if D is not None:
        y = y + D.astype(y.dtype).reshape((1,) * (y.ndim - 1) + D.shape) * x
    if z is not None:
        y = y * jax.nn.silu(z.astype(y.dtype))
    return y
