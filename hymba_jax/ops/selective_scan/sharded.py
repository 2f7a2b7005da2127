"""The selective scan of a sequence whose length is split over the devices of a mesh axis.

Twice over its own part, each device runs whatever implementation it is given: from zero, for the
state that the part adds, and from the state that the parts before leave, for the outputs.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from hymba_jax.types import Array, Bool, Float


def selective_scan_sharded(
    scan: Callable[..., tuple[Array, Array]],
    axis_name: str,
    x: Float[Array, "batch length channels"],
    dt: Float[Array, "batch length channels"],
    A: Float[Array, "state channels"],
    B: Float[Array, "batch length state"],
    C: Float[Array, "batch length state"],
    D: Float[Array, "channels"] | None,
    z: Float[Array, "batch length channels"] | None,
    dt_bias: Float[Array, "channels"] | None,
    initial_state: Float[Array, "batch state channels"] | None,
    resets: Bool[Array, "batch length"] | None,
) -> tuple[Float[Array, "batch length channels"], Float[Array, "batch state channels"]]:
    """`selective_scan` of this device's part, inside `by_device`.

    Args:
      scan: an implementation of the scan.
      axis_name: the mesh axis that the length is split over.
      x, dt, A, B, C, D, z, dt_bias, resets: as there, of this device's part.
      initial_state: the state before the first device's part.

    Returns:
      y of this device's part, and the state after the last device's part.
    """
    if initial_state is None:
        initial_state = jnp.zeros((x.shape[0], *A.shape), jnp.float32)

    _, added = scan(x, dt, A, B, C, dt_bias=dt_bias, resets=resets)
    # One round of communication. A prefix by `ppermute` would move fewer of these small arrays, but
    # waits for as many rounds as the number of devices has bits.
    parts = lax.all_gather((_decay(dt, A, dt_bias, resets), added), axis_name)

    def pass_part(h: Array, part: tuple[Array, Array]) -> tuple[Array, Array]:
        decay, added = part
        return decay * h + added, h

    final_state, before = lax.scan(pass_part, initial_state.astype(jnp.float32), parts)
    y, _ = scan(x, dt, A, B, C, D, z, dt_bias, before[lax.axis_index(axis_name)], resets)
    return y, final_state


def _decay(
    dt: Array, A: Array, dt_bias: Array | None, resets: Array | None
) -> Float[Array, "batch state channels"]:
    """What this part leaves of the state before it."""
    dt = dt.astype(jnp.float32)
    if dt_bias is not None:
        dt = dt + dt_bias.astype(jnp.float32)[None, None]
    decay = jnp.exp(jax.nn.softplus(dt).sum(1)[:, None] * A.astype(jnp.float32)[None])
    if resets is not None:
        decay = jnp.where(resets.any(1)[:, None, None], 0, decay)
    return decay
