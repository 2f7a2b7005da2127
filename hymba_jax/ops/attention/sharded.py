"""Attention of sequences whose length is sharded over a mesh axis.

Keys and values travel, not queries: they have fewer heads. From neighbour to neighbour, each
device is given those before its own shard that its queries see: all of them in a global layer, as
many as the window is long in the others. The meta tokens', which are in the first device's shard,
are sent to all. A layer that reuses keys and values has its own shard of them, and fetches the rest
again.

Keys are put together before they are met, not one shard at a time (a ring, arXiv 2310.01889): the
same numbers are sent, and any implementation that knows `first_key` can compute with them, given
one for each query where rows have several documents. What it costs is memory: 16 MB a sequence of
8192 tokens for each global layer of the 1.5B in bfloat16.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jax import lax

from hymba_jax.ops.attention.reference import FirstKey
from hymba_jax.types import Array, Float


def attention_sharded(
    attend: Callable[..., Array],
    axis_name: str,
    query: Float[Array, "batch length heads head_dim"],
    key: Float[Array, "batch length kv_heads head_dim"],
    value: Float[Array, "batch length kv_heads value_dim"],
    *,
    window: int | None,
    num_meta_tokens: int,
    first_key: FirstKey | None,
) -> Float[Array, "batch length heads value_dim"]:
    """`attention` of this device's queries over whole sequences, inside `by_device`.

    Args:
      attend: an implementation of attention.
      axis_name: the mesh axis that the length is sharded over, in shards of `num_meta_tokens`
        positions at least.
      query, key, value: this device's shard of them.
      window, num_meta_tokens: as in `attention`.
      first_key: of whole sequences, for each row or each query of this device's shard.
    """
    own, meta, device = query.shape[1], num_meta_tokens, lax.axis_index(axis_name)
    before = (lax.axis_size(axis_name) - 1) * own
    reach = before if window is None else min(window, before)
    keys, values = (
        jnp.concatenate([_of_first(axis_name, x[:, :meta]), _before(axis_name, x, reach), x], 1)
        for x in (key, value)
    )
    # In front of it among those: zeros, and the meta tokens where they stand once more.
    first_text = meta if first_key is None else jnp.maximum(meta, first_key)
    first_of_these = meta + jnp.maximum(0, reach + first_text - device * own)
    output = attend(
        query,
        keys,
        values,
        window=window,
        num_meta_tokens=meta,
        first_key=jnp.broadcast_to(first_of_these, query.shape[: max(1, first_of_these.ndim)]),
    )
    if not meta:
        return output
    # The meta tokens' own queries do not see all meta tokens, as all others do.
    firsts = (x[:, :meta] for x in (query, key, value))
    of_meta = attend(*firsts, window=window, num_meta_tokens=meta)
    of_meta = jnp.where(device == 0, of_meta, output[:, :meta])
    return jnp.concatenate([of_meta, output[:, meta:]], axis=1)


def _before(
    axis_name: str, x: Float[Array, "batch length heads width"], reach: int
) -> Float[Array, "batch keys heads width"]:
    """The last `reach` positions before this shard; zeros for those before the first one."""
    links = [(i, i + 1) for i in range(lax.axis_size(axis_name) - 1)]
    own, parts = x.shape[1], []
    for sent in range(0, reach, own):
        x = lax.ppermute(x[:, -(reach - sent) :], axis_name, links)
        parts.append(x)
    return jnp.concatenate([x[:, :0], *reversed(parts)], axis=1)


def _of_first(
    axis_name: str, x: Float[Array, "batch meta_tokens heads width"]
) -> Float[Array, "batch meta_tokens heads width"]:
    """The first device's, on all devices."""
    return lax.psum(jnp.where(lax.axis_index(axis_name) == 0, x, 0), axis_name)
