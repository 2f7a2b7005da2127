"""`attention_step` on GPUs: flash-decoding as a Pallas kernel in Triton.

A program takes one sequence's key/value head, and some of its slots: meta tokens, the new token's
own key and the filled slots of the cache pass through registers once, 8-bit ones as they are
stored, and scores never reach memory. The query heads that share the keys are the rows of one
matmul. Where sequences are few, the slots of a head are split among programs, whose sums are added
with the factors that their largest scores differ by (flash-decoding).
"""

from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jax.typing import DTypeLike

from hymba_jax.ops.int8_rows import Int8Rows
from hymba_jax.ops.kernel_cost import array_bytes, kernel_cost
from hymba_jax.types import Array, Float, Int

BLOCK = 64  # slots whose keys and values are in registers at once
_ROWS = 16  # of Triton's smallest matmul
_PROGRAMS = 2 * 132  # that keep an H100 busy
_MIN_SLOTS = 256  # of a program
_LOWEST = -1e30  # below every score; its exponential is zero


class AttentionParts(NamedTuple):
    """What programs that share the slots of a head have computed, to be added by `combine`.

    Attributes:
      sums: of weighted values; where a single program has all slots, the output itself.
      totals: of weights, each relative to the largest; None for a single program.
      largest: score.
    """

    sums: Float[Array, "batch kv_heads programs heads_of_kv value_dim"]
    totals: Float[Array, "batch kv_heads programs heads_of_kv"] | None = None
    largest: Float[Array, "batch kv_heads programs heads_of_kv"] | None = None

    def combine(self, dtype: DTypeLike) -> Float[Array, "batch kv_heads heads_of_kv value_dim"]:
        if self.totals is None or self.largest is None:
            return self.sums[:, :, 0]
        factors = jnp.exp(self.largest - self.largest.max(2, keepdims=True))
        total = (self.totals * factors).sum(2)
        return ((self.sums * factors[..., None]).sum(2) / total[..., None]).astype(dtype)


def supports(
    dtype: DTypeLike, heads: int, head_dim: int, value_dim: int, cache_elements: int
) -> bool:
    """Whether the kernel takes such queries: of 16 bits, of heads whose width Triton has.

    Args:
      heads: query heads that share a key/value head.
      cache_elements: of the cached keys or values, whichever are more.
    """
    widths_fit = all(width in (16, 32, 64, 128, 256) for width in (head_dim, value_dim))
    indices_fit = cache_elements < 2**31  # Pallas computes those of 8-bit arrays in 32 bits
    return jnp.dtype(dtype).itemsize == 2 and heads <= _ROWS and widths_fit and indices_fit


def splits_of(batch: int, kv_heads: int, slots: int) -> tuple[int, int]:
    """Programs that share the slots of a head, and how many blocks each has."""
    wanted = min(pl.cdiv(_PROGRAMS, batch * kv_heads), max(slots // _MIN_SLOTS, 1))
    blocks = pl.cdiv(pl.cdiv(slots, BLOCK), wanted)
    return pl.cdiv(pl.cdiv(slots, BLOCK), blocks), blocks


def attention_step_gpu(
    query: Float[Array, "batch kv_heads heads_of_kv head_dim"],
    key: Float[Array, "batch kv_heads head_dim"],
    value: Float[Array, "batch kv_heads value_dim"],
    **cache: Any,
) -> Float[Array, "batch kv_heads heads_of_kv value_dim"]:
    """As `attention_step`, with query heads by the key/value head that they share."""
    return attention_parts(query, key, value, **cache).combine(value.dtype)


def attention_parts(
    query: Float[Array, "batch kv_heads heads_of_kv head_dim"],
    key: Float[Array, "batch kv_heads head_dim"],
    value: Float[Array, "batch kv_heads value_dim"],
    *,
    past_key: Float[Array, "batch kv_heads slots head_dim"] | Int8Rows,
    past_value: Float[Array, "batch kv_heads slots value_dim"] | Int8Rows,
    past_length: Int[Array, "batch"],
    meta_key: Float[Array, "kv_heads meta_tokens head_dim"],
    meta_value: Float[Array, "kv_heads meta_tokens value_dim"],
) -> AttentionParts:
    """`attention_step_gpu` before its programs' sums are added."""
    batch, kv_heads, heads, head_dim = query.shape
    value_dim, meta_tokens = value.shape[-1], meta_key.shape[1]
    slots = jax.tree.leaves(past_key)[0].shape[2]
    splits, blocks = splits_of(batch, kv_heads, slots)
    past_key, past_value = (
        Int8Rows(kv.integers, kv.scale[..., 0]) if isinstance(kv, Int8Rows) else kv
        for kv in (past_key, past_value)
    )
    if not meta_tokens:  # no array of Triton's is empty
        one = ((0, 0), (0, 1), (0, 0))
        meta_key, meta_value = jnp.pad(meta_key, one), jnp.pad(meta_value, one)
    operands = (query, key, value, past_key, past_value, past_length, meta_key, meta_value)

    def of_head(array: Array, axes: int = 2) -> pl.BlockSpec:
        """What a program sees of an array by row and head, or by head alone."""
        rest = array.shape[axes:]
        index = (lambda b, h, i: (b, h)) if axes == 2 else (lambda b, h, i: (h,))
        zeros = (0,) * len(rest)
        return pl.BlockSpec((None,) * axes + rest, lambda b, h, i: (*index(b, h, i), *zeros))

    def of_program(*rest: int) -> tuple[pl.BlockSpec, jax.ShapeDtypeStruct]:
        """What each program writes."""
        zeros = (0,) * len(rest)
        spec = pl.BlockSpec((None, None, None, *rest), lambda *program: (*program, *zeros))
        dtype = value.dtype if splits == 1 else jnp.float32
        return spec, jax.ShapeDtypeStruct((*grid, *rest), dtype)

    by_head = partial(jax.tree.map, of_head)
    grid = (batch, kv_heads, splits)
    results = [of_program(heads, value_dim)]
    if splits > 1:
        results += [of_program(heads), of_program(heads)]
    parts = pl.pallas_call(
        partial(_kernel, blocks=blocks, meta_tokens=meta_tokens, scale=head_dim**-0.5),
        grid=grid,
        in_specs=(
            *by_head((query, key, value, past_key, past_value)),
            pl.BlockSpec((None,), lambda b, h, i: (b,)),
            of_head(meta_key, 1),
            of_head(meta_value, 1),
        ),
        out_specs=[spec for spec, _ in results],
        out_shape=[shape for _, shape in results],
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=3),
        cost_estimate=kernel_cost(
            flops=2 * batch * kv_heads * _ROWS * (slots + meta_tokens) * (head_dim + value_dim),
            exponentials=batch * kv_heads * _ROWS * (slots + meta_tokens),
            hbm_bytes=array_bytes(*operands),
        ),
        name="attention_step",
    )(*operands)
    return AttentionParts(*parts)


def _kernel(
    query_ref: Any,
    key_ref: Any,
    value_ref: Any,
    past_key_ref: Any,
    past_value_ref: Any,
    length_ref: Any,
    meta_key_ref: Any,
    meta_value_ref: Any,
    *result_refs: Any,
    blocks: int,
    meta_tokens: int,
    scale: float,
) -> None:
    """The attention of a program's slots; of several programs, weighted values to be added, the
    sum of weights, and the largest score."""
    slots = jax.tree.leaves(past_key_ref)[0].shape[0]
    split, length = pl.program_id(2), jnp.minimum(length_ref[...], slots)
    # The last head fills Triton's matmul, as often as it takes; its result is written as often.
    heads = jnp.minimum(jnp.arange(_ROWS), query_ref.shape[0] - 1)
    key_axis, value_axis = (jnp.arange(ref.shape[-1]) for ref in (key_ref, value_ref))
    query = triton.load(query_ref.at[heads[:, None], key_axis[None]])

    def rows(ref: Any, start: Array, exists: Array) -> tuple[Array, Array | None]:
        """Keys or values of a block of slots, zero where there are none, and their scales."""
        at = pl.ds(start, BLOCK)
        if isinstance(ref, Int8Rows):
            integers, scale = cast(Any, ref.integers), cast(Any, ref.scale)
            integers = triton.load(integers.at[at, :], mask=exists[:, None], other=0)
            scale = triton.load(scale.at[at], mask=exists, other=0.0)
            return integers.astype(query.dtype), scale.astype(jnp.float32)
        return triton.load(ref.at[at, :], mask=exists[:, None], other=0.0), None

    def add(
        key_ref: Any, value_ref: Any, count: Array, block: Array, carry: tuple[Array, Array, Array]
    ) -> tuple[Array, Array, Array]:
        """The sums with one more block of keys and values."""
        sums, total, largest = carry
        start = block * BLOCK
        exists = start + jnp.arange(BLOCK) < count
        key, key_scales = rows(key_ref, start, exists)
        scores = triton.dot(query, key, trans_b=True) * scale
        if key_scales is not None:
            scores = scores * key_scales[None]
        scores = jnp.where(exists[None], scores, _LOWEST)
        above = jnp.maximum(largest, scores.max(1))
        weights = jnp.where(exists[None], jnp.exp(scores - above[:, None]), 0.0)
        before = jnp.exp(largest - above)
        total = total * before + weights.sum(1)
        value, value_scales = rows(value_ref, start, exists)
        if value_scales is not None:
            weights = weights * value_scales[None]
        added = triton.dot(weights.astype(value.dtype), value)
        return sums * before[:, None] + added, total, above

    def own_and_meta() -> tuple[Array, Array, Array]:
        """Of the new token and the meta tokens, which the first program of a head takes."""
        own = (query.astype(jnp.float32) * key_ref[...].astype(jnp.float32)[None]).sum(1) * scale
        sums = jnp.ones((_ROWS, 1), jnp.float32) * value_ref[...].astype(jnp.float32)[None]
        carry = sums, jnp.ones(_ROWS, jnp.float32), own
        count = jnp.int32(meta_tokens)
        for block in range(pl.cdiv(meta_tokens, BLOCK)):
            carry = add(meta_key_ref, meta_value_ref, count, jnp.int32(block), carry)
        return carry

    def nothing() -> tuple[Array, Array, Array]:
        zeros = jnp.zeros(_ROWS, jnp.float32)
        return jnp.zeros((_ROWS, value_ref.shape[0]), jnp.float32), zeros, zeros + _LOWEST

    first = split * blocks
    last = jnp.minimum(first + blocks, pl.cdiv(length, BLOCK))
    sums, total, largest = lax.fori_loop(
        first,
        last,
        partial(add, past_key_ref, past_value_ref, length),
        lax.cond(split == 0, own_and_meta, nothing),
    )
    sums_ref, *other_refs = result_refs
    if not other_refs:
        sums = sums / total[:, None]
    triton.store(sums_ref.at[heads[:, None], value_axis[None]], sums.astype(sums_ref.dtype))
    for ref, result in zip(other_refs, (total, largest), strict=False):
        triton.store(ref.at[heads], result)
