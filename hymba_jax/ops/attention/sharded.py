"""Attention of sequences whose length is sharded over a mesh axis.

Keys and values are sent, not queries, as they have fewer heads. Each device receives, from
neighbour to neighbour, those before its shard that its queries attend to: all of them in a global
layer, `window` in the others. The meta tokens' are replicated. A layer that reuses keys and values
has its own shard of them, and fetches the rest again.

Keys are concatenated before attention, not processed shard by shard (ring attention, arXiv
2310.01889): the same bytes are sent, and any implementation that supports `kv_start` can be used,
with one for each query where rows contain several documents. It costs memory: 16 MB a sequence of
8192 tokens for each global layer of the 1.5B in bfloat16.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax

from hymba_jax.ops.attention.reference import KVStart
from hymba_jax.types import Array, Float


def attention_sharded(
    attend: Callable[..., Array],
    axis_name: str,
    query: Float[Array, "batch length heads head_dim"],
    key: Float[Array, "batch length kv_heads head_dim"],
    value: Float[Array, "batch length kv_heads value_dim"],
    *,
    window: int | None,
    kv_start: KVStart | None,
    **meta: Any,
) -> Float[Array, "batch length heads value_dim"]:
    """`attention` of this device's queries over whole sequences, inside `shard_map`.

    Args:
      attend: an implementation of attention.
      axis_name: the mesh axis that the length is sharded over.
      query, key, value: this device's shard of them.
      window: as in `attention`.
      kv_start: of whole sequences, for each row or each query of this device's shard.
      meta: keys and values of the meta tokens, replicated.
    """
    own, device = query.shape[1], lax.axis_index(axis_name)
    before = (lax.axis_size(axis_name) - 1) * own
    reach = before if window is None else min(window, before)
    keys, values = (jnp.concatenate([_before(axis_name, x, reach), x], 1) for x in (key, value))
    # Before the first position of the sequence these are zeros.
    first = reach - device * own + (0 if kv_start is None else kv_start)
    first = jnp.broadcast_to(jnp.maximum(0, first), query.shape[: max(1, jnp.ndim(first))])
    return attend(query, keys, values, window=window, kv_start=first, **meta)


def _before(
    axis_name: str, x: Float[Array, "batch length heads width"], reach: int
) -> Float[Array, "batch keys heads width"]:
    """The last `reach` positions before this shard; zeros for those before the first one."""
    links = [(i, i + 1) for i in range(lax.axis_size(axis_name) - 1)]
    own, shards = x.shape[1], []
    for sent in range(0, reach, own):
        x = lax.ppermute(x[:, -(reach - sent) :], axis_name, links)
        shards.append(x)
    return jnp.concatenate([x[:, :0], *reversed(shards)], axis=1)
