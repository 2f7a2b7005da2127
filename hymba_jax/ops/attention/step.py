"""Attention of one new token, for decoding."""

import functools

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from hymba_jax.ops.int8_rows import Int8Rows
from hymba_jax.ops.precision import einsum
from hymba_jax.types import Array, Float, Int


def attention_step(
    query: Float[Array, "batch heads head_dim"],
    key: Float[Array, "batch kv_heads head_dim"],
    value: Float[Array, "batch kv_heads value_dim"],
    *,
    past_key: Float[Array, "batch kv_heads slots head_dim"] | Int8Rows,
    past_value: Float[Array, "batch kv_heads slots value_dim"] | Int8Rows,
    past_length: Int[Array, "batch"],
    meta_key: Float[Array, "kv_heads meta_tokens head_dim"],
    meta_value: Float[Array, "kv_heads meta_tokens value_dim"],
) -> Float[Array, "batch heads value_dim"]:
    """`attention` of a single query over its own key, the cache and the meta tokens.

    There is no window: the cache holds no more than the window, in any order.

    Args:
      query, key, value: of the new token.
      past_key, past_value: of 8-bit integers, they are not written as floats: scales are applied to
        scores and weights.
      past_length: slots of each row that are filled, from the first.
      meta_key, meta_value: the same for all rows, and held once.
    """
    batch, heads, head_dim = query.shape
    kv_heads, slots = key.shape[1], jax.tree.leaves(past_key)[0].shape[2]
    query = query.reshape(batch, kv_heads, heads // kv_heads, head_dim)
    scale = head_dim**-0.5
    filled = jnp.arange(slots)[None] < past_length[:, None]
    past = _past_scores(past_key, query).swapaxes(2, 3) * scale
    past = jnp.where(filled[:, None, None], past, -jnp.inf)
    own = _scores("bhd,bhgd->bhg", key, query)[..., None] * scale
    meta = _scores("hmd,hbgd->hbgm", meta_key, query.swapaxes(0, 1)).swapaxes(0, 1) * scale
    # A softmax over all three, whose scores are not copied into one array.
    parts = past, own, meta
    maxima = (part.max(3, keepdims=True, initial=-jnp.inf) for part in parts)
    largest = functools.reduce(jnp.maximum, maxima)
    past, own, meta = (jnp.exp(part - largest) for part in parts)
    total = past.sum(3, keepdims=True) + own + meta.sum(3, keepdims=True)
    output = (
        _past_sums(past, past_value, value.dtype)
        + own.astype(value.dtype).astype(jnp.float32) * value[:, :, None].astype(jnp.float32)
        + _sums("hbgm,hmv->hbgv", meta.swapaxes(0, 1), meta_value).swapaxes(0, 1)
    ) / total
    return output.astype(value.dtype).reshape(batch, heads, -1)


def _past_scores(key: Array | Int8Rows, query: Array) -> Array:
    # Keys before the query: XLA:CPU reads them three times as fast as the other way round.
    subscripts = "bhsd,bhgd->bhsg"
    if isinstance(key, Int8Rows):
        return _scores(subscripts, key.integers.astype(query.dtype), query) * key.scale
    return _scores(subscripts, key, query)


def _past_sums(weights: Array, value: Array | Int8Rows, dtype: DTypeLike) -> Array:
    subscripts = "bhgs,bhsv->bhgv"
    if isinstance(value, Int8Rows):
        weights = weights * value.scale.swapaxes(2, 3)
        return _sums(subscripts, weights, value.integers.astype(dtype))
    return _sums(subscripts, weights, value)


def _scores(subscripts: str, key: Array, query: Array) -> Array:
    query = query.astype(key.dtype)
    return einsum(subscripts, key, query, preferred_element_type=jnp.float32)


def _sums(subscripts: str, weights: Array, value: Array) -> Array:
    weights = weights.astype(value.dtype)
    return einsum(subscripts, weights, value, preferred_element_type=jnp.float32)
