"""The selective scan of a sequence whose length is sharded over a mesh axis.

Each device scans its shard twice with the given implementation: from zero, to find the shard's
contribution to the state, and from the state after the preceding shards, for the outputs.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from hymba_jax.ops.documents import Documents
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
    starts: Bool[Array, "batch length"] | None,
) -> tuple[Float[Array, "batch length channels"], Float[Array, "batch state channels"]]:
    """`selective_scan` of this device's shard, inside `shard_map`.

    Args:
      scan: an implementation of the scan.
      axis_name: the mesh axis that the length is sharded over.
      x, dt, A, B, C, D, z, dt_bias: as there, of this device's shard.
      initial_state: the state before the first device's shard.
      starts: where documents start from `initial_state`, in this device's shard.

    Returns:
      y of this device's shard, and the state after the last device's shard.
    """
    if initial_state is None:
        initial_state = jnp.zeros((x.shape[0], *A.shape), jnp.float32)
    documents = None if starts is None else Documents(starts, initial_state)
    has_start = None if starts is None else starts.any(1)[:, None, None]

    _, added = scan(x, dt, A, B, C, dt_bias=dt_bias, documents=documents)
    # One round of communication. A prefix by `ppermute` would move fewer of these small arrays, but
    # waits for as many rounds as the number of devices has bits.
    shards = lax.all_gather((_decay(dt, A, dt_bias, has_start), added, has_start), axis_name)

    def pass_shard(h: Array, shard: tuple[Any, ...]) -> tuple[Array, Array]:
        decay, added, has_start = shard
        after = decay * h + added
        return after if has_start is None else jnp.where(has_start, added, after), h

    final_state, before = lax.scan(pass_shard, initial_state.astype(jnp.float32), shards)
    y, _ = scan(x, dt, A, B, C, D, z, dt_bias, before[lax.axis_index(axis_name)], documents)
    return y, final_state


def _decay(
    dt: Array, A: Array, dt_bias: Array | None, has_start: Array | None
) -> Float[Array, "batch state channels"]:
    """The decay of the incoming state over this shard, if no document starts in it."""
    dt = dt.astype(jnp.float32)
    if dt_bias is not None:
        dt = dt + dt_bias.astype(jnp.float32)[None, None]
    total = jax.nn.softplus(dt).sum(1)[:, None]
    if has_start is not None:
        # Unused then, and masked in the gradient: another document's values may be NaN.
        total = jnp.where(has_start, 0, total)
    return jnp.exp(total * A.astype(jnp.float32)[None])
