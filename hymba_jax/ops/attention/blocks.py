"""Attention in plain XLA, a block of queries and a block of keys at a time, on any platform.

A block of queries attends to the meta tokens and to those blocks of keys that its mask reaches:
half of them without a window, a fixed number with one. Weights are not stored: the forward pass
keeps a running maximum and sum (arXiv 2112.05682), the backward pass recomputes the weights from
the log-sum-exp (arXiv 2205.14135).
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from hymba_jax.ops.attention.reference import KVStart, attention_mask
from hymba_jax.ops.precision import einsum
from hymba_jax.ops.remat import ATTENTION, named
from hymba_jax.ops.sequential_map import sequential_map
from hymba_jax.types import Array, Float, Int

# Lower than any score, but finite: the difference of two of them is a number.
_LOWEST = -1e30
_einsum = partial(einsum, preferred_element_type=jnp.float32)
_zeros = partial(jnp.zeros, dtype=jnp.float32)
type _Carry = tuple[Array, ...]


def blocks(
    query: Float[Array, "batch queries heads head_dim"],
    key: Float[Array, "batch keys kv_heads head_dim"],
    value: Float[Array, "batch keys kv_heads value_dim"],
    *,
    window: int | None,
    num_meta_tokens: int,
    kv_start: KVStart | None = None,
    block: int = 256,
) -> Float[Array, "batch queries heads value_dim"]:
    """`attention` with memory linear in the length, and time in proportion to the unmasked blocks.

    Rows share their loops: each takes the time of the longest range of keys in the batch. A query
    without valid keys has output zero.

    Args:
      block: queries and keys taken at a time, at most.
    """
    mask = _Mask(window, min(num_meta_tokens, key.shape[1]), block)
    return _attention(query, key, value, kv_start, mask)


class _Mask(NamedTuple):
    """Static properties of the mask, and the block size."""

    window: int | None
    num_meta_tokens: int
    block: int


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attention(
    query: Array,
    key: Array,
    value: Array,
    kv_start: KVStart | None,
    mask: _Mask,
) -> Array:
    return _forward(query, key, value, kv_start, mask)[0]


def _forward(
    query: Array,
    key: Array,
    value: Array,
    kv_start: Array | None,
    mask: _Mask,
) -> tuple[Array, tuple[Any, ...]]:
    def query_block(at: tuple[Array, Array]) -> tuple[Array, Array]:
        start, q = at
        q = _by_head(q, key.shape[2])

        def accumulate(carry: _Carry, start: Array | int, scores: Array) -> _Carry:
            highest, total, output = carry
            higher = jnp.maximum(highest, jnp.max(scores, axis=-1, keepdims=True))
            weights = jnp.exp(scores - higher)
            shrink = jnp.exp(highest - higher)
            total = total * shrink + jnp.sum(weights, axis=-1, keepdims=True)
            v = _keys_at(start, value, scores.shape[-1])
            output = output * shrink + _einsum("bhgqk,bkhv->bhgqv", weights.astype(v.dtype), v)
            return higher, total, output

        zero = _zeros((*q.shape[:-1], 1))
        carry = (zero + _LOWEST, zero, _zeros((*q.shape[:-1], value.shape[-1])))
        highest, total, output = _over_keys(accumulate, carry, q, key, start, kv_start, mask)
        # The sum is at least 1, except for fully masked queries.
        total = jnp.maximum(total, 1e-30)
        output = _by_query((output / total).astype(value.dtype))
        return output, highest + jnp.log(total)

    q = _split(query, mask.block)
    output, log_sum = sequential_map(query_block, (_starts(query, key, q), q))
    output, log_sum = named(ATTENTION, (_join(output, query.shape[1]), log_sum))
    return output, (query, key, value, kv_start, output, log_sum)


def _backward(mask: _Mask, residuals: tuple[Any, ...], doutput: Array) -> tuple[Any, ...]:
    query, key, value, kv_start, output, log_sum = residuals
    scale = query.shape[-1] ** -0.5

    def query_block(
        gradients: tuple[Array, Array], at: tuple[Array, ...]
    ) -> tuple[tuple[Array, Array], Array]:
        start, *of_queries, log_sum = at
        q, do, mean = (_by_head(x, key.shape[2]) for x in of_queries)

        def accumulate(carry: _Carry, start: Array | int, scores: Array) -> _Carry:
            dq, dkey, dvalue = carry
            k, v = (_keys_at(start, x, scores.shape[-1]) for x in (key, value))
            weights = jnp.exp(scores - log_sum)
            dscores = weights * (_einsum("bhgqv,bkhv->bhgqk", do, v) - mean) * scale
            dscores = dscores.astype(k.dtype)
            dq = dq + _einsum("bhgqk,bkhd->bhgqd", dscores, k)
            dk = _einsum("bhgqk,bhgqd->bkhd", dscores, q)
            dv = _einsum("bhgqk,bhgqv->bkhv", weights.astype(v.dtype), do)
            return dq, _add_at(start, dkey, dk), _add_at(start, dvalue, dv)

        carry = (_zeros(q.shape), *gradients)
        dq, dkey, dvalue = _over_keys(accumulate, carry, q, key, start, kv_start, mask)
        return (dkey, dvalue), _by_query(dq.astype(query.dtype))

    # The derivative of the weights' sum, which is always 1.
    mean = jnp.sum(doutput.astype(jnp.float32) * output, axis=-1, keepdims=True)
    q, do, mean = (_split(x, mask.block) for x in (query, doutput, mean))
    zeros = (_zeros(key.shape), _zeros(value.shape))
    (dkey, dvalue), dq = lax.scan(
        query_block, zeros, (_starts(query, key, q), q, do, mean, log_sum)
    )
    dquery = _join(dq, query.shape[1])
    return dquery, dkey.astype(key.dtype), dvalue.astype(value.dtype), None


_attention.defvjp(_forward, _backward)


def _over_keys(
    accumulate: Callable[[_Carry, Array | int, Array], _Carry],
    carry: _Carry,
    query: Float[Array, "batch kv_heads group block head_dim"],
    key: Float[Array, "batch keys kv_heads head_dim"],
    query_start: Int[Array, ""],
    kv_start: KVStart | None,
    mask: _Mask,
) -> _Carry:
    """`carry = accumulate(carry, start, scores)` for the meta tokens and each visible block of
    keys."""
    keys, window, meta = key.shape[1], mask.window, mask.num_meta_tokens
    positions = query_start + jnp.arange(query.shape[3])
    if kv_start is not None and kv_start.ndim == 2:
        # Padding queries are treated like the first one.
        place = positions - keys + kv_start.shape[1]
        kv_start = kv_start[:, jnp.maximum(place, 0)]

    def scores(start: Array | int, last: Array | int, size: int, **limits: Any) -> Array:
        """Scores of the keys from `start` on; those from `last` on are accumulated already."""
        k = _keys_at(start, key, size)
        scores = _einsum("bhgqd,bkhd->bhgqk", query, k) * query.shape[-1] ** -0.5
        at = start + jnp.arange(size)
        seen = attention_mask(positions[None], at, num_meta_tokens=0, **limits)
        seen = seen & (at < last)[None, None]
        # Else XLA computes the mask again for each use of the scores.
        return lax.optimization_barrier(jnp.where(seen[:, None, None], scores, -jnp.inf))

    if meta:
        carry = accumulate(carry, 0, scores(0, meta, meta, window=None))
    if meta == keys:
        return carry
    size = min(mask.block, keys - meta)
    begin = jnp.asarray(meta)
    if window is not None:
        begin = jnp.maximum(begin, query_start - window)
    if kv_start is not None and keys - meta > size:  # a loop of one round costs more than it saves
        begin = jnp.maximum(begin, jnp.min(kv_start))
    end = query_start + query.shape[3]

    def key_block(j: Array | int, carry: _Carry) -> _Carry:
        last = end - j * size
        start = jnp.maximum(last - size, meta)
        return accumulate(carry, start, scores(start, last, size, window=window, kv_start=kv_start))

    return lax.fori_loop(0, (end - begin + size - 1) // size, key_block, carry)


def _keys_at(start: Array | int, x: Array, size: int) -> Array:
    return lax.dynamic_slice_in_dim(x, start, size, axis=1)


def _add_at(start: Array | int, x: Array, update: Array) -> Array:
    update = _keys_at(start, x, update.shape[1]) + update
    return lax.dynamic_update_slice_in_dim(x, update, start, axis=1)


def _split(
    x: Float[Array, "batch queries heads dim"], block: int
) -> Float[Array, "blocks batch block heads dim"]:
    """Equal blocks of queries, the first one padded."""
    batch, queries, heads, dim = x.shape
    size = min(block, queries)
    padding = -queries % size  # before the first, so that blocks end where blocks of keys end
    x = jnp.pad(x, ((0, 0), (padding, 0), (0, 0), (0, 0)))
    return x.reshape(batch, -1, size, heads, dim).swapaxes(0, 1)


def _join(
    x: Float[Array, "blocks batch block heads dim"], queries: int
) -> Float[Array, "batch queries heads dim"]:
    blocks, batch, size, heads, dim = x.shape
    return x.swapaxes(0, 1).reshape(batch, blocks * size, heads, dim)[:, -queries:]


def _by_head(
    x: Float[Array, "batch block heads dim"], kv_heads: int
) -> Float[Array, "batch kv_heads group block dim"]:
    """Heads grouped by their key/value head."""
    batch, size, heads, dim = x.shape
    x = x.reshape(batch, size, kv_heads, heads // kv_heads, dim)
    return x.transpose(0, 2, 3, 1, 4)


def _by_query(
    x: Float[Array, "batch kv_heads group block dim"],
) -> Float[Array, "batch block heads dim"]:
    batch, kv_heads, group, size, dim = x.shape
    return x.transpose(0, 3, 1, 2, 4).reshape(batch, size, kv_heads * group, dim)


def _starts(query: Array, key: Array, query_blocks: Array) -> Int[Array, "blocks"]:
    """Position of each block's first query among the keys; negative for padding."""
    count, size = query_blocks.shape[0], query_blocks.shape[2]
    return key.shape[1] - size * jnp.arange(count, 0, -1)
