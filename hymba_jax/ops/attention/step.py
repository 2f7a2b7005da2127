"""Attention of one new token, for decoding."""

import jax
import jax.numpy as jnp

from hymba_jax.ops.precision import einsum
from hymba_jax.types import Array, Float, Int


def attention_step(
    query: Float[Array, "batch heads head_dim"],
    key: Float[Array, "batch kv_heads head_dim"],
    value: Float[Array, "batch kv_heads value_dim"],
    *,
    past_key: Float[Array, "batch kv_heads slots head_dim"],
    past_value: Float[Array, "batch kv_heads slots value_dim"],
    past_length: Int[Array, "batch"],
    meta_key: Float[Array, "kv_heads meta_tokens head_dim"],
    meta_value: Float[Array, "kv_heads meta_tokens value_dim"],
) -> Float[Array, "batch heads value_dim"]:
    """`attention` of a single query over its own key, the cache and the meta tokens.

    There is no window: the cache holds no more than the window, in any order.

    Args:
      query, key, value: of the new token.
      past_length: slots of each row that are filled, from the first.
      meta_key, meta_value: the same for all rows, and held once.
    """
    batch, heads, head_dim = query.shape
    kv_heads, slots = past_key.shape[1:3]
    meta_tokens = meta_key.shape[1]
    query = query.reshape(batch, kv_heads, heads // kv_heads, head_dim)
    # Keys before the query: XLA:CPU reads them three times as fast as the other way round.
    scores = jnp.concatenate(
        (
            _scores("bhsd,bhgd->bhsg", past_key, query).swapaxes(2, 3),
            _scores("bhd,bhgd->bhg", key, query)[..., None],
            _scores("hmd,hbgd->hbgm", meta_key, query.swapaxes(0, 1)).swapaxes(0, 1),
        ),
        axis=3,
    )
    filled = jnp.arange(slots + 1 + meta_tokens)[None] < past_length[:, None]
    seen = filled | (jnp.arange(slots + 1 + meta_tokens)[None] >= slots)
    scores = jnp.where(seen[:, None, None], scores * head_dim**-0.5, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=3)
    past, own, meta = jnp.split(weights.astype(value.dtype), (slots, slots + 1), axis=3)
    output = (
        _sums("bhgs,bhsv->bhgv", past, past_value)
        + own.astype(jnp.float32) * value[:, :, None].astype(jnp.float32)
        + _sums("hbgm,hmv->hbgv", meta.swapaxes(0, 1), meta_value).swapaxes(0, 1)
    )
    return output.astype(value.dtype).reshape(batch, heads, -1)


def _scores(subscripts: str, key: Array, query: Array) -> Array:
    query = query.astype(key.dtype)
    return einsum(subscripts, key, query, preferred_element_type=jnp.float32)


def _sums(subscripts: str, weights: Array, value: Array) -> Array:
    weights = weights.astype(value.dtype)
    return einsum(subscripts, weights, value, preferred_element_type=jnp.float32)
