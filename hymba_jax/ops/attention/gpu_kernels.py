"""The attention kernels for GPUs.

A thread block has two warpgroups. Each holds 64 rows of the result in registers, and both share
what asynchronous copies bring to shared memory two steps ahead. The forward pass and the gradient
of the queries hold rows of queries and pass over blocks of keys (arXiv 2205.14135); the gradients
of keys and values hold rows of keys and pass over the queries of every head that shares them, so
that each sum has one owner and one order.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from hymba_jax.ops.attention.gpu_tiles import (
    SLOTS,
    WARPGROUPS,
    KeyTile,
    QueryTile,
    Sizes,
    Stream,
    kernel,
    key_spans,
    put,
    query_spans,
    row_numbers,
)
from hymba_jax.ops.kernel_cost import array_bytes, kernel_cost, visited_blocks
from hymba_jax.ops.wgmma import multiply_add, shared, spread, zeros
from hymba_jax.types import Array, Float, Int

# Lower than any score, but finite: the difference of two of them is a number.
_LOWEST = -1e30


def forward(
    query: Float[Array, "batch queries heads head_dim"],
    key: Float[Array, "batch keys kv_heads head_dim"],
    value: Float[Array, "batch keys kv_heads value_dim"],
    lowest: Int[Array, "batch queries"],
    sizes: Sizes,
) -> tuple[Float[Array, "batch queries heads value_dim"], Float[Array, "batch heads queries"]]:
    """The output and, with base 2, the logarithm of the sum of exponentials of scores.

    Args:
      lowest: the first key that each query sees besides the meta tokens.
    """
    batch, queries, heads, head_dim = query.shape
    group, value_dim = heads // key.shape[2], value.shape[-1]

    def attention_forward(
        *refs: Any, query_s: Any, output_s: Any, loaded: Any, stream: Stream
    ) -> None:
        query, key, value, lowest, spans, output, log_sum = refs
        tile = QueryTile(queries, spans, sizes)
        own = loaded.at[tile.warpgroup]
        q = query_s.at[tile.warpgroup]
        plgpu.copy_gmem_to_smem(query.at[tile.row, tile.rows, tile.head], q, own)
        first = tile.numbers(lowest.at[tile.row, tile.rows])
        plgpu.barrier_wait(own)

        def step(i: Any, slots: Sequence[Any], carry: tuple[Array, ...]) -> tuple[Array, ...]:
            highest, total, sums = carry
            k, v = slots
            (scores,) = multiply_add((zeros(sizes.rows, sizes.keys), q, k.transpose((1, 0))))
            scores = tile.masked(i, scores, first)
            higher = jnp.maximum(highest, jnp.max(scores, axis=1) * sizes.log2_scale)
            weights = jnp.exp2(scores * sizes.log2_scale - spread(higher, scores, 0))
            shrink = jnp.exp2(highest - higher)
            total = total * shrink + jnp.sum(weights, axis=1)
            sums = sums * spread(shrink, sums, 0)
            (sums,) = multiply_add((sums, weights.astype(jnp.bfloat16), v))
            return higher, total, sums

        carry = (
            row_numbers(sizes, _LOWEST),
            row_numbers(sizes, 0.0),
            zeros(sizes.rows, value_dim),
        )
        highest, total, sums = stream.run(
            tile.steps, lambda i: tile.keys(i, group, key, value), step, carry
        )
        # The sum is at least 1, except for fully masked queries.
        total = jnp.maximum(total, 1e-30)
        log_sum_at = log_sum.at[tile.row, tile.head, tile.rows]
        plgpu.store(log_sum_at, highest + jnp.log2(total), optimized=False)
        result = sums * spread(1.0 / total, sums, 0)
        put(result, output_s.at[tile.warpgroup], output.at[tile.row, tile.rows, tile.head])

    out_type = (
        jax.ShapeDtypeStruct((batch, queries, heads, value_dim), query.dtype),
        jax.ShapeDtypeStruct((batch, heads, queries), jnp.float32),
    )
    run = kernel(
        attention_forward,
        out_type,
        {"blocks": queries // sizes.block, "batch": batch, "heads": heads},
        _cost(head_dim + value_dim, sizes, query, key, value, out_type),
        query_s=shared(WARPGROUPS, sizes.rows, head_dim),
        output_s=shared(WARPGROUPS, sizes.rows, value_dim),
        loaded=plgpu.Barrier(num_barriers=WARPGROUPS),
        stream=Stream.scratch(*(shared(SLOTS, sizes.keys, n) for n in (head_dim, value_dim))),
    )
    return run(query, key, value, lowest, key_spans(lowest, key.shape[1], sizes))


def backward_query(
    query: Float[Array, "batch queries heads head_dim"],
    key: Float[Array, "batch keys kv_heads head_dim"],
    value: Float[Array, "batch keys kv_heads value_dim"],
    doutput: Float[Array, "batch queries heads value_dim"],
    log_sum: Float[Array, "batch heads queries"],
    mean: Float[Array, "batch heads queries"],
    lowest: Int[Array, "batch queries"],
    sizes: Sizes,
) -> Float[Array, "batch queries heads head_dim"]:
    """The gradient of the queries.

    Args:
      mean: of the gradients of each query's weights.
    """
    batch, queries, heads, head_dim = query.shape
    group, value_dim = heads // key.shape[2], value.shape[-1]

    def attention_backward_query(
        *refs: Any, query_s: Any, doutput_s: Any, loaded: Any, stream: Stream
    ) -> None:
        query, key, value, doutput, log_sum, mean, lowest, spans, dquery = refs
        tile = QueryTile(queries, spans, sizes)
        own = loaded.at[tile.warpgroup]
        q, do = query_s.at[tile.warpgroup], doutput_s.at[tile.warpgroup]
        plgpu.copy_gmem_to_smem(query.at[tile.row, tile.rows, tile.head], q, own)
        plgpu.copy_gmem_to_smem(doutput.at[tile.row, tile.rows, tile.head], do, own)
        first = tile.numbers(lowest.at[tile.row, tile.rows])
        base, average = (
            tile.numbers(ref.at[tile.row, tile.head, tile.rows]) for ref in (log_sum, mean)
        )
        plgpu.barrier_wait(own)

        def step(i: Any, slots: Sequence[Any], sums: Array) -> Array:
            k, v = slots
            # One after the other, as there are no registers for the mask beside both.
            (scores,) = multiply_add((zeros(sizes.rows, sizes.keys), q, k.transpose((1, 0))))
            scores = tile.masked(i, scores, first)
            weights = jnp.exp2(scores * sizes.log2_scale - spread(base, scores, 0))
            (dweights,) = multiply_add((zeros(sizes.rows, sizes.keys), do, v.transpose((1, 0))))
            dscores = weights * (dweights - spread(average, scores, 0))
            (sums,) = multiply_add((sums, dscores.astype(jnp.bfloat16), k))
            return sums

        sums = stream.run(
            tile.steps, lambda i: tile.keys(i, group, key, value), step, zeros(sizes.rows, head_dim)
        )
        put(sums * sizes.scale, q, dquery.at[tile.row, tile.rows, tile.head])

    run = kernel(
        attention_backward_query,
        jax.ShapeDtypeStruct(query.shape, query.dtype),
        {"blocks": queries // sizes.block, "batch": batch, "heads": heads},
        _cost(2 * head_dim + value_dim, sizes, query, key, value, doutput, query),
        query_s=shared(WARPGROUPS, sizes.rows, head_dim),
        doutput_s=shared(WARPGROUPS, sizes.rows, value_dim),
        loaded=plgpu.Barrier(num_arrivals=2, num_barriers=WARPGROUPS),
        stream=Stream.scratch(*(shared(SLOTS, sizes.keys, n) for n in (head_dim, value_dim))),
    )
    spans = key_spans(lowest, key.shape[1], sizes)
    return run(query, key, value, doutput, log_sum, mean, lowest, spans)


def backward_key_value(
    query: Float[Array, "batch queries heads head_dim"],
    key: Float[Array, "batch keys kv_heads head_dim"],
    value: Float[Array, "batch keys kv_heads value_dim"],
    doutput: Float[Array, "batch queries heads value_dim"],
    log_sum: Float[Array, "batch heads queries"],
    mean: Float[Array, "batch heads queries"],
    lowest: Int[Array, "batch queries"],
    sizes: Sizes,
) -> tuple[
    Float[Array, "batch keys kv_heads head_dim"], Float[Array, "batch keys kv_heads value_dim"]
]:
    """The gradients of keys and values; arguments as of `backward_query`."""
    batch, keys, kv_heads, head_dim = key.shape
    group, value_dim = query.shape[2] // kv_heads, value.shape[-1]

    def attention_backward_key_value(
        *refs: Any, key_s: Any, value_s: Any, loaded: Any, stream: Stream
    ) -> None:
        query, key, value, doutput, log_sum, mean, lowest, spans, dkey, dvalue = refs
        tile = KeyTile(group, spans, sizes)
        own = loaded.at[tile.warpgroup]
        k, v = key_s.at[tile.warpgroup], value_s.at[tile.warpgroup]
        plgpu.copy_gmem_to_smem(key.at[tile.row, tile.rows, tile.head], k, own)
        plgpu.copy_gmem_to_smem(value.at[tile.row, tile.rows, tile.head], v, own)
        plgpu.barrier_wait(own)

        def step(i: Any, slots: Sequence[Any], sums: tuple[Array, ...]) -> tuple[Array, ...]:
            dk, dv = sums
            q, do, base, average, first = slots
            nothing = zeros(sizes.rows, sizes.queries)
            scores, dweights = multiply_add(
                (nothing, k, q.transpose((1, 0))), (nothing, v, do.transpose((1, 0)))
            )
            scores = tile.masked(i, scores, first) * sizes.log2_scale
            weights = jnp.exp2(scores - spread(tile.numbers(base), scores, 1))
            dscores = weights * (dweights - spread(tile.numbers(average), scores, 1))
            return multiply_add(
                (dk, dscores.astype(jnp.bfloat16), q), (dv, weights.astype(jnp.bfloat16), do)
            )

        dk, dv = stream.run(
            tile.steps,
            lambda i: tile.queries(i, query, doutput, log_sum, mean, lowest),
            step,
            (zeros(sizes.rows, head_dim), zeros(sizes.rows, value_dim)),
        )
        put(dk * sizes.scale, k, dkey.at[tile.row, tile.rows, tile.head])
        put(dv, v, dvalue.at[tile.row, tile.rows, tile.head])

    numbers = (
        plgpu.SMEM((SLOTS, sizes.queries), dtype) for dtype in (jnp.float32,) * 2 + (jnp.int32,)
    )
    run = kernel(
        attention_backward_key_value,
        tuple(jax.ShapeDtypeStruct(v.shape, v.dtype) for v in (key, value)),
        {"blocks": keys // sizes.block, "batch": batch, "heads": kv_heads},
        _cost(2 * (head_dim + value_dim), sizes, query, key, value, doutput, key, value),
        key_s=shared(WARPGROUPS, sizes.rows, head_dim),
        value_s=shared(WARPGROUPS, sizes.rows, value_dim),
        loaded=plgpu.Barrier(num_arrivals=2, num_barriers=WARPGROUPS),
        stream=Stream.scratch(
            shared(SLOTS, sizes.queries, head_dim),
            shared(SLOTS, sizes.queries, value_dim),
            *numbers,
        ),
    )
    spans = query_spans(lowest, keys, sizes)
    return run(query, key, value, doutput, log_sum, mean, lowest, spans)


def _cost(widths: int, sizes: Sizes, query: Array, key: Array, *others: Any) -> pl.CostEstimate:
    """Of a kernel with matmuls of `widths` channels in all for each score that it computes.

    What blocks fetch again is taken to be in the L2 cache, which is larger than a row's keys and
    values.
    """
    batch, queries, heads, _ = query.shape
    visits = visited_blocks(
        sizes.offset,
        queries,
        key.shape[1],
        sizes.window,
        sizes.block,
        sizes.keys,
        sizes.meta_blocks,
    )
    scores = batch * heads * visits * sizes.block * sizes.keys
    return kernel_cost(2 * widths * scores, scores, array_bytes(query, key, others))
