"""The SSD recurrence of a sequence whose length is sharded over a mesh axis.

Each device runs its shard twice, as in `selective_scan/sharded.py`: from zero, to find the shard's
contribution to the state, and from the state after the preceding shards, for the outputs.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from hymba_jax.ops.documents import Documents
from hymba_jax.types import Array, Bool, Float


def ssd_sharded(
    scan: Callable[..., tuple[Array, Array]],
    axis_name: str,
    x: Float[Array, "batch length ssm_heads ssm_head_dim"],
    dt: Float[Array, "batch length ssm_heads"],
    A: Float[Array, "ssm_heads"],
    B: Float[Array, "batch length ssm_groups state"],
    C: Float[Array, "batch length ssm_groups state"],
    D: Float[Array, "ssm_heads"] | None,
    dt_bias: Float[Array, "ssm_heads"] | None,
    initial_state: Float[Array, "batch ssm_heads ssm_head_dim state"],
    starts: Bool[Array, "batch length"] | None,
) -> tuple[
    Float[Array, "batch length ssm_heads ssm_head_dim"],
    Float[Array, "batch ssm_heads ssm_head_dim state"],
]:
    """`ssd` of this device's shard, inside `shard_map`.

    Args:
      scan: an implementation of the op.
      axis_name: the mesh axis that the length is sharded over.
      x, dt, A, B, C, D, dt_bias: as there, of this device's shard.
      initial_state: the state before the first device's shard.
      starts: where documents start from `initial_state`, in this device's shard.

    Returns:
      y of this device's shard, and the state after the last device's shard.
    """
    documents = None if starts is None else Documents(starts, initial_state)
    has_start = None if starts is None else starts.any(1)[:, None]

    _, added = scan(x, dt, A, B, C, dt_bias=dt_bias, documents=documents)
    shards = lax.all_gather((_decay(dt, A, dt_bias, has_start), added, has_start), axis_name)

    def pass_shard(h: Array, shard: tuple[Any, ...]) -> tuple[Array, Array]:
        decay, added, has_start = shard
        after = decay[..., None, None] * h + added
        if has_start is not None:
            after = jnp.where(has_start[..., None, None], added, after)
        return after, h

    final_state, before = lax.scan(pass_shard, initial_state.astype(jnp.float32), shards)
    y, _ = scan(x, dt, A, B, C, D, dt_bias, before[lax.axis_index(axis_name)], documents)
    return y, final_state


def _decay(
    dt: Array, A: Array, dt_bias: Array | None, has_start: Array | None
) -> Float[Array, "batch ssm_heads"]:
    """The decay of the incoming state over this shard, if no document starts in it."""
    dt = dt.astype(jnp.float32)
    if dt_bias is not None:
        dt = dt + dt_bias.astype(jnp.float32)[None, None]
    total = jax.nn.softplus(dt).sum(1)
    if has_start is not None:
        total = jnp.where(has_start, 0, total)  # unused then
    return jnp.exp(total * A.astype(jnp.float32)[None])
