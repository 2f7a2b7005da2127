"""Reference attention: the mask, the weights, and the weighted sum of the values."""

import jax
import jax.numpy as jnp

from hymba_jax.ops.precision import einsum
from hymba_jax.types import Array, Bool, Float, Int

# Of each row; or of each query, where a row has several documents.
type KVStart = Int[Array, "batch"] | Int[Array, "batch queries"]


def attention_mask(
    query_positions: Int[Array, "#batch queries"],
    key_positions: Int[Array, " keys"],
    *,
    window: int | None,
    num_meta_tokens: int,
    kv_start: KVStart | None = None,
) -> Bool[Array, "#batch queries keys"]:
    """Which keys each query attends to, by absolute positions that count the meta tokens.

    Causal; with a window, only the last `window` positions and every meta token; keys before
    `kv_start`, of the row or of the query, are masked.
    """
    keys = key_positions[None, None]
    distance = query_positions[:, :, None] - keys
    causal = distance >= 0
    is_meta = jnp.broadcast_to(keys < num_meta_tokens, causal.shape)
    seen = causal if window is None else causal & ((distance <= window) | is_meta)
    if kv_start is None:
        return seen
    first = kv_start[:, None, None] if kv_start.ndim == 1 else kv_start[:, :, None]
    return seen & ((keys >= first) | is_meta)


def attention_weights(
    query: Float[Array, "batch queries heads head_dim"],
    key: Float[Array, "batch keys kv_heads head_dim"],
    mask: Bool[Array, "#batch queries keys"],
) -> Float[Array, "batch kv_heads group queries keys"]:
    """softmax(query key / sqrt(head_dim)) in float32; query head h reads key head h // group."""
    batch, queries, heads, head_dim = query.shape
    kv_heads = key.shape[2]
    grouped = query.reshape(batch, queries, kv_heads, heads // kv_heads, head_dim)
    scores = einsum("bqhgd,bkhd->bhgqk", grouped, key, preferred_element_type=jnp.float32)
    scores = jnp.where(mask[:, None, None], scores * head_dim**-0.5, -jnp.inf)
    return jax.nn.softmax(scores, axis=-1)


def reference(
    query: Float[Array, "batch queries heads head_dim"],
    key: Float[Array, "batch keys kv_heads head_dim"],
    value: Float[Array, "batch keys kv_heads value_dim"],
    *,
    window: int | None,
    num_meta_tokens: int,
    kv_start: KVStart | None = None,
) -> Float[Array, "batch queries heads value_dim"]:
    """The definition, with all queries x keys weights in memory."""
    queries, keys = query.shape[1], key.shape[1]
    mask = attention_mask(
        jnp.arange(keys - queries, keys)[None],
        jnp.arange(keys),
        window=window,
        num_meta_tokens=num_meta_tokens,
        kv_start=kv_start,
    )
    weights = attention_weights(query, key, mask).astype(value.dtype)
    output = einsum("bhgqk,bkhv->bqhgv", weights, value)
    return output.reshape(*query.shape[:3], value.shape[-1])
