"""Attention of one new token, for decoding."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from hymba_jax.ops.attention.step_gpu import attention_step_gpu, supports
from hymba_jax.ops.int8_rows import Int8Rows
from hymba_jax.ops.platform import target_platform
from hymba_jax.ops.precision import einsum
from hymba_jax.parallel.shard_map import Axes, shard_map
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
      past_length: tokens of each row before this one; the first min(past_length, slots) slots are
        filled.
      meta_key, meta_value: the same for all rows, and held once.
    """
    batch, heads, head_dim = query.shape
    kv_heads = key.shape[1]
    attend = _attend
    cache_elements = max(leaf.size for leaf in jax.tree.leaves((past_key, past_value)))
    if target_platform().endswith("gpu") and supports(
        query.dtype, heads // kv_heads, head_dim, value.shape[-1], cache_elements
    ):
        attend = _on_shards(attention_step_gpu)
    output = attend(
        query.reshape(batch, kv_heads, heads // kv_heads, head_dim),
        key,
        value,
        past_key=past_key,
        past_value=past_value,
        past_length=past_length,
        meta_key=meta_key,
        meta_value=meta_value,
    )
    return output.reshape(batch, heads, -1)


def _attend(
    query: Float[Array, "batch kv_heads heads_of_kv head_dim"],
    key: Float[Array, "batch kv_heads head_dim"],
    value: Float[Array, "batch kv_heads value_dim"],
    *,
    past_key: Float[Array, "batch kv_heads slots head_dim"] | Int8Rows,
    past_value: Float[Array, "batch kv_heads slots value_dim"] | Int8Rows,
    past_length: Int[Array, "batch"],
    meta_key: Float[Array, "kv_heads meta_tokens head_dim"],
    meta_value: Float[Array, "kv_heads meta_tokens value_dim"],
) -> Float[Array, "batch kv_heads heads_of_kv value_dim"]:
    """In plain XLA."""
    slots, scale = jax.tree.leaves(past_key)[0].shape[2], query.shape[-1] ** -0.5
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
    return output.astype(value.dtype)


def _on_shards(attend: Callable[..., Array]) -> Callable[..., Array]:
    """A kernel for which each device computes its shard of rows and heads."""
    heads: Axes = ("batch", "heads", None)
    cache: Axes = (*heads, None)
    axes = {"query": cache, "key": heads, "value": heads, "past_length": ("batch",)}
    axes |= dict.fromkeys(("past_key", "key_scale", "past_value", "value_scale"), cache)
    axes |= dict.fromkeys(("meta_key", "meta_value"), ("heads", None, None))

    def on_shard(
        past_key: Array,
        key_scale: Array | None,
        past_value: Array,
        value_scale: Array | None,
        **arrays: Array,
    ) -> Array:
        keys = past_key if key_scale is None else Int8Rows(past_key, key_scale)
        values = past_value if value_scale is None else Int8Rows(past_value, value_scale)
        return attend(past_key=keys, past_value=values, **arrays)

    def run(query: Array, key: Array, value: Array, **arrays: Any) -> Array:
        for name in ("key", "value"):
            kv = arrays[f"past_{name}"]
            is_int8 = isinstance(kv, Int8Rows)
            arrays[f"past_{name}"], arrays[f"{name}_scale"] = kv if is_int8 else (kv, None)
        result: Array = shard_map(
            on_shard, axes, cache, query=query, key=key, value=value, **arrays
        )
        return result

    return run


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
