"""Attention as Pallas kernels for TPUs: blocks of keys that a block of queries sees, and no others.

A program takes one row, the query heads of one key/value head and a block of queries. The row's
keys and values stay in VMEM for all of them. Scores are computed transposed, keys x queries: what
there is one of for each query, such as the log-sum-exp (arXiv 2205.14135), is a row of lanes then.

Each query sees the meta tokens and the keys from its first one to its own position; windows and
documents only differ in which the first one is. A mask costs few of the instructions that wait for
matmuls anyway, so every block of keys has one.

Queries and keys have their positions innermost, as XLA lays out what a width of 1600 does not fill
tiles of; values and the output have their channels innermost.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from hymba_jax.ops.attention.reference import KVStart
from hymba_jax.ops.exp2 import LOG2_E
from hymba_jax.ops.kernel_cost import block_bytes, kernel_cost, visited_blocks
from hymba_jax.ops.precision import kernel_dot
from hymba_jax.ops.remat import ATTENTION, named
from hymba_jax.types import Array, Bool, Float, Int

_SUBLANES, _LANES = 8, 128  # of a tile of float32
# Queries and keys per block, at most: of the scores in a window of 1024, a sixth is masked.
_BLOCK = 256
# What head_dim is filled up to a multiple of: the rows of a tile of bfloat16.
_ROWS = 16
# Lower than any score, but finite: the difference of two of them is a number.
_LOWEST = -1e30

# Bytes of VMEM for all that does not depend on the length, and of its capacity how much the kernels
# may have: XLA keeps arrays there, too.
_VMEM = 16 * 2**20
_VMEM_SHARE = 7 / 8

# A VMEM or SMEM ref.
Ref = Any


class _Sizes(NamedTuple):
    """Static properties. Positions are counted from the first one after the meta tokens.

    Attributes:
      start: position of the first query.
      meta: meta tokens.
      kv_heads, group: heads of keys and values, and query heads of each.
      rows, value_dim: of a head, filled up to whole tiles.
      block_q, block_k: queries and keys per block.
      window: as in `attention`; only the cost depends on it.
      scale: of the scores.
    """

    start: int
    meta: int
    kv_heads: int
    group: int
    rows: int
    value_dim: int
    block_q: int
    block_k: int
    window: int | None
    scale: float

    @property
    def offset(self) -> int:
        """Where the first position is in the arrays of keys and values, behind the meta tokens."""
        return _whole(self.meta, _LANES)

    @property
    def exponent(self) -> float:
        """By which scores are multiplied to be exponents of 2."""
        return self.scale * LOG2_E


class _Inputs(NamedTuple):
    """What both kernels read. Where all rows have the same mask, it has one row."""

    begin: Ref  # (rows, blocks of queries): the first block of keys that they see; in SMEM
    first: Ref  # (rows, 1, queries): position of the first key that a query sees
    query: Ref  # (batch, heads * head_dim, queries)
    key: Ref  # (batch, kv_heads * head_dim, keys)
    value: Ref  # (batch, keys, kv_heads * value_dim)


def pallas_tpu(
    query: Float[Array, "batch queries heads head_dim"],
    key: Float[Array, "batch keys kv_heads head_dim"],
    value: Float[Array, "batch keys kv_heads value_dim"],
    *,
    window: int | None,
    num_meta_tokens: int,
    kv_start: KVStart | None = None,
) -> Float[Array, "batch queries heads value_dim"]:
    """`attention` on TPUs, of queries behind the meta tokens. A query without valid keys has output
    zero.

    Raises:
      ValueError: compiled for a CPU outside Pallas's interpret mode.
    """
    _, queries, heads, head_dim = query.shape
    kv_heads, value_dim = value.shape[2:]
    tokens = key.shape[1] - num_meta_tokens
    sizes = _Sizes(
        start=tokens - queries,
        meta=num_meta_tokens,
        kv_heads=kv_heads,
        group=heads // kv_heads,
        rows=_whole(head_dim, _ROWS),
        value_dim=_whole(value_dim, _LANES),
        block_q=min(_BLOCK, _whole(queries, _LANES)),
        block_k=min(_BLOCK, _whole(tokens, _LANES)),
        window=window,
        scale=head_dim**-0.5,
    )
    first = _first_keys(queries, sizes, window, kv_start)
    output = _attention(
        _Inputs(
            begin=first.reshape(len(first), -1, sizes.block_q).min(2) // sizes.block_k,
            first=first[:, None],
            query=_positions_innermost(_pad(query, {1: sizes.block_q, 3: _ROWS})),
            key=_positions_innermost(_whole_blocks(_pad(key, {3: _ROWS}), sizes)),
            value=_channels_innermost(_whole_blocks(_pad(value, {3: _LANES}), sizes)),
        ),
        sizes,
    )
    output = output.reshape(*output.shape[:2], heads, sizes.value_dim)
    return output[:, :queries, :, :value_dim]


def fits_in_vmem(
    key: Float[Array, "batch keys kv_heads head_dim"],
    value: Float[Array, "batch keys kv_heads value_dim"],
) -> bool:
    """Whether the kernels can take rows of so many keys on the TPU that is traced for."""
    needed = _vmem_bytes(key.shape[1], key.shape[3], value.shape[3], key.dtype.itemsize)
    return needed <= _VMEM_SHARE * pltpu.get_tpu_info().vmem_capacity_bytes


def _first_keys(
    queries: int, sizes: _Sizes, window: int | None, kv_start: KVStart | None
) -> Int[Array, "rows whole_queries"]:
    """Positions of the first keys besides the meta tokens that queries see, if no later than they
    are. Queries that fill up the last block are like the last one."""
    first = jnp.zeros((1, queries), jnp.int32)
    if window is not None:
        first = jnp.maximum(first, sizes.start - window + jnp.arange(queries)[None])
    if kv_start is not None:
        kv_start = kv_start[:, None] if kv_start.ndim == 1 else kv_start
        first = jnp.maximum(first, kv_start - sizes.meta)
    return jnp.pad(first, ((0, 0), (0, -queries % sizes.block_q)), mode="edge")


def _whole_blocks(
    x: Float[Array, "batch keys kv_heads width"], sizes: _Sizes
) -> Float[Array, "batch whole_keys kv_heads width"]:
    """Meta tokens filled up to whole tiles, and the other keys to whole blocks."""
    if sizes.offset > sizes.meta:
        meta, x = jnp.split(x, [sizes.meta], axis=1)
        x = jnp.concatenate([_pad(meta, {1: _LANES}), x], axis=1)
    missing = -(x.shape[1] - sizes.offset) % sizes.block_k
    return jnp.pad(x, ((0, 0), (0, missing), (0, 0), (0, 0)))


def _positions_innermost(
    x: Float[Array, "batch length heads width"],
) -> Float[Array, "batch channels length"]:
    batch, length, heads, width = x.shape
    return x.transpose(0, 2, 3, 1).reshape(batch, heads * width, length)


def _channels_innermost(
    x: Float[Array, "batch length heads width"],
) -> Float[Array, "batch length channels"]:
    return x.reshape(*x.shape[:2], -1)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _attention(inputs: _Inputs, sizes: _Sizes) -> Array:
    return _forward(inputs, sizes)[0]


def _attention_fwd(inputs: _Inputs, sizes: _Sizes) -> tuple[Array, tuple[_Inputs, Array, Array]]:
    output, log_sum = named(ATTENTION, _forward(inputs, sizes))
    return output, (inputs, output, log_sum)


def _attention_bwd(
    sizes: _Sizes, residuals: tuple[_Inputs, Array, Array], doutput: Array
) -> tuple[_Inputs]:
    inputs, output, log_sum = residuals
    dquery, dkey, dvalue = _backward(inputs, output, log_sum, doutput, sizes)
    return (_Inputs(None, None, dquery, dkey, dvalue),)


_attention.defvjp(_attention_fwd, _attention_bwd)


def _forward(
    inputs: _Inputs, sizes: _Sizes
) -> tuple[Float[Array, "batch queries channels"], Float[Array, "batch kv_heads group queries"]]:
    """The output, and the logarithm to base 2 of each query's sum of exponentials."""
    batch, _, queries = inputs.query.shape
    keys, dtype = inputs.key.shape[2], inputs.query.dtype
    channels = inputs.value.shape[2] * sizes.group
    out_shape = [
        jax.ShapeDtypeStruct((batch, queries, channels), inputs.value.dtype),
        jax.ShapeDtypeStruct((batch, sizes.kv_heads, sizes.group, queries), jnp.float32),
    ]
    specs = _specs(inputs, sizes)
    out_specs = [_output_spec(sizes), _log_sum_spec(sizes)]
    grid = _grid(
        inputs,
        sizes,
        in_specs=[specs],
        out_specs=out_specs,
        scratch_shapes=[
            pltpu.VMEM((keys, sizes.rows), dtype),
            pltpu.VMEM((sizes.value_dim, keys), dtype),
            pltpu.VMEM((sizes.group, _SUBLANES, sizes.block_q), jnp.float32),
            pltpu.VMEM((sizes.group, _SUBLANES, sizes.block_q), jnp.float32),
            pltpu.VMEM((sizes.group, sizes.value_dim, sizes.block_q), jnp.float32),
        ],
    )
    return pl.pallas_call(
        partial(_forward_kernel, sizes=sizes),
        grid_spec=grid,
        out_shape=out_shape,
        compiler_params=_params(inputs, sizes),
        cost_estimate=_cost(
            inputs,
            sizes,
            sizes.rows + sizes.value_dim,
            block_bytes(_programs(inputs, sizes), [specs, out_specs], [inputs[1:], out_shape]),
        ),
        name="attention_forward",
    )(*inputs)


def _forward_kernel(*refs: Ref, sizes: _Sizes) -> None:
    inputs = _Inputs(*refs[:5])
    output_ref, log_sum_ref, key_ref, value_ref, highest_ref, total_ref, sum_ref = refs[5:]

    @pl.when(pl.program_id(2) == 0)
    def _() -> None:
        def transpose(at: Ref) -> None:
            key_ref[at] = inputs.key[0, :, at].T
            value_ref[:, at] = inputs.value[0, at].T

        _over_tiles(key_ref.shape[0], transpose)

    highest_ref[...] = jnp.full(highest_ref.shape, _LOWEST)
    total_ref[...] = jnp.zeros(total_ref.shape)
    sum_ref[...] = jnp.zeros(sum_ref.shape)

    def visit(at: Ref, seen: Bool[Array, "keys queries"] | None) -> None:
        def attend(head: int, scores: Float[Array, "tiles sublanes queries"]) -> None:
            highest = highest_ref[head]
            higher = jnp.maximum(highest, scores.max(0).max(0, keepdims=True))
            weights = jnp.exp2((scores - higher[None]) * sizes.exponent)
            shrink = jnp.exp2((highest - higher) * sizes.exponent)
            highest_ref[head] = higher
            total_ref[head] = total_ref[head] * shrink + weights.sum(0)
            update = kernel_dot(value_ref[:, at], _flat(weights).astype(value_ref.dtype))
            sum_ref[head] = _flat(_tiles(sum_ref[head]) * shrink[None]) + update

        def scores(head: int) -> tuple[Array]:
            return (_tiles(_scores(key_ref[at], inputs, head, seen, sizes)),)

        _pipeline(sizes.group, scores, attend)

    _over_keys(visit, inputs, sizes)
    for head in range(sizes.group):
        # The sum is at least 1, except for fully masked queries.
        total = jnp.maximum(total_ref[head].sum(0, keepdims=True), 1e-30)
        output = (sum_ref[head] / total).T
        output_ref[0, :, _channels(head, sizes)] = output.astype(output_ref.dtype)
        log_sum = highest_ref[head, :1] * sizes.exponent + jnp.log2(total)
        log_sum_ref[0, 0, head : head + 1] = log_sum


def _backward(
    inputs: _Inputs, output: Array, log_sum: Array, doutput: Array, sizes: _Sizes
) -> tuple[Array, Array, Array]:
    """The gradients of queries, keys and values."""
    keys, dtype = inputs.key.shape[2], inputs.query.dtype
    specs = _specs(inputs, sizes)
    in_specs = [specs, _output_spec(sizes), _log_sum_spec(sizes), _output_spec(sizes)]
    out_specs = [specs.query, specs.key, specs.value]
    out_shape = [
        jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (inputs.query, inputs.key, inputs.value)
    ]
    grid = _grid(
        inputs,
        sizes,
        in_specs=in_specs,
        out_specs=out_specs,
        scratch_shapes=[
            pltpu.VMEM((keys, sizes.rows), dtype),
            pltpu.VMEM((sizes.group, _SUBLANES, sizes.block_q), jnp.float32),
            pltpu.VMEM((sizes.group, _SUBLANES, sizes.block_q), jnp.float32),
            pltpu.VMEM((sizes.group, sizes.rows, sizes.block_q), jnp.float32),
            pltpu.VMEM((keys, sizes.rows), jnp.float32),
            pltpu.VMEM((keys, sizes.value_dim), jnp.float32),
        ],
    )
    return pl.pallas_call(
        partial(_backward_kernel, sizes=sizes),
        grid_spec=grid,
        out_shape=out_shape,
        compiler_params=_params(inputs, sizes),
        cost_estimate=_cost(
            inputs,
            sizes,
            3 * sizes.rows + 2 * sizes.value_dim,
            block_bytes(
                _programs(inputs, sizes),
                [in_specs, out_specs],
                [inputs[1:], output, log_sum, doutput, out_shape],
            ),
        ),
        name="attention_backward",
    )(*inputs, output, log_sum, doutput)


def _backward_kernel(*refs: Ref, sizes: _Sizes) -> None:
    inputs = _Inputs(*refs[:5])
    output_ref, log_sum_ref, doutput_ref, dquery_ref, dkey_ref, dvalue_ref = refs[5:11]
    key_ref, exponent_ref, mean_ref, dquery_sum_ref, dkey_sum_ref, dvalue_sum_ref = refs[11:]

    @pl.when(pl.program_id(2) == 0)
    def _() -> None:
        def begin(at: Ref) -> None:
            key_ref[at] = inputs.key[0, :, at].T
            dkey_sum_ref[at] = jnp.zeros((_LANES, sizes.rows))
            dvalue_sum_ref[at] = jnp.zeros((_LANES, sizes.value_dim))

        _over_tiles(key_ref.shape[0], begin)

    ones = jnp.ones((_SUBLANES, sizes.value_dim))
    for head in range(sizes.group):
        do, output = (ref[0, :, _channels(head, sizes)] for ref in (doutput_ref, output_ref))
        # The derivative of the weights' sum, which is always 1.
        mean_ref[head] = kernel_dot(ones, do.astype(jnp.float32) * output, (1, 1))
        log_sum = log_sum_ref[0, 0, head : head + 1]
        exponent_ref[head] = jnp.broadcast_to(log_sum, exponent_ref.shape[1:])
    dquery_sum_ref[...] = jnp.zeros(dquery_sum_ref.shape)

    def visit(at: Ref, seen: Bool[Array, "keys queries"] | None) -> None:
        dkey, dvalue = dkey_sum_ref[at], dvalue_sum_ref[at]

        def scores(head: int) -> tuple[Array, Array]:
            do = doutput_ref[0, :, _channels(head, sizes)]
            scores = _scores(key_ref[at], inputs, head, seen, sizes)
            return _tiles(scores), _tiles(kernel_dot(inputs.value[0, at], do, (1, 1)))

        def differentiate(head: int, scores: Array, dweights: Array) -> None:
            nonlocal dkey, dvalue
            do = doutput_ref[0, :, _channels(head, sizes)]
            weights = jnp.exp2(scores * sizes.exponent - exponent_ref[head][None])
            dscores = _flat(weights * (dweights - mean_ref[head][None])).astype(do.dtype)
            dvalue += kernel_dot(_flat(weights).astype(do.dtype), do)
            dkey += kernel_dot(dscores, inputs.query[0, _rows(head, sizes)], (1, 1))
            dquery_sum_ref[head] += kernel_dot(inputs.key[0, :, at], dscores)

        _pipeline(sizes.group, scores, differentiate)
        dkey_sum_ref[at], dvalue_sum_ref[at] = dkey, dvalue

    _over_keys(visit, inputs, sizes)
    for head in range(sizes.group):
        dquery = dquery_sum_ref[head] * sizes.scale
        dquery_ref[0, _rows(head, sizes)] = dquery.astype(dquery_ref.dtype)

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _() -> None:
        def end(at: Ref) -> None:
            dkey = (dkey_sum_ref[at] * sizes.scale).T
            dkey_ref[0, :, at] = dkey.astype(dkey_ref.dtype)
            dvalue_ref[0, at] = dvalue_sum_ref[at].astype(dvalue_ref.dtype)

        _over_tiles(key_ref.shape[0], end)


def _pipeline(
    heads: int, begin: Callable[[int], tuple[Array, ...]], end: Callable[..., None]
) -> None:
    """`end(head, *begin(head))` for each head, with the matmuls of the next one begun before."""
    begun = begin(0)
    for head in range(heads):
        following = begin(head + 1) if head + 1 < heads else ()
        end(head, *begun)
        begun = following


def _tiles(x: Float[Array, "rows queries"]) -> Float[Array, "tiles sublanes queries"]:
    return x.reshape(-1, _SUBLANES, x.shape[1])


def _flat(x: Float[Array, "tiles sublanes queries"]) -> Float[Array, "rows queries"]:
    return x.reshape(-1, x.shape[2])


def _channels(head: int, sizes: _Sizes) -> slice:
    return slice(head * sizes.value_dim, (head + 1) * sizes.value_dim)


def _rows(head: int, sizes: _Sizes) -> slice:
    return slice(head * sizes.rows, (head + 1) * sizes.rows)


def _scores(
    keys: Float[Array, "keys head_dim"],
    inputs: _Inputs,
    head: int,
    seen: Bool[Array, "keys queries"] | None,
    sizes: _Sizes,
) -> Float[Array, "keys queries"]:
    scores = kernel_dot(keys, inputs.query[0, _rows(head, sizes)])
    return scores if seen is None else jnp.where(seen, scores, -jnp.inf)


def _over_keys(
    visit: Callable[[Ref, Bool[Array, "keys queries"] | None], None],
    inputs: _Inputs,
    sizes: _Sizes,
) -> None:
    """`visit(at, seen)` for the meta tokens and each block of keys that one of the queries sees;
    `seen` is None where they see all of them."""
    if sizes.meta:
        key = lax.broadcasted_iota(jnp.int32, (sizes.offset, sizes.block_q), 0)
        visit(pl.ds(0, sizes.offset), key < sizes.meta if sizes.offset > sizes.meta else None)

    block = pl.program_id(2)
    row = pl.program_id(0) if inputs.begin.shape[0] > 1 else 0
    position = sizes.start + block * sizes.block_q
    shape = (sizes.block_k, sizes.block_q)
    query = position + lax.broadcasted_iota(jnp.int32, shape, 1)

    def visit_block(j: Array, _: None) -> None:
        key = j * sizes.block_k + lax.broadcasted_iota(jnp.int32, shape, 0)
        start = pl.multiple_of(sizes.offset + j * sizes.block_k, _LANES)
        visit(pl.ds(start, sizes.block_k), (key <= query) & (key >= inputs.first[0]))

    # Queries that fill up the last block may be behind the last key.
    blocks = (inputs.key.shape[2] - sizes.offset) // sizes.block_k
    end = lax.div(position + sizes.block_q + sizes.block_k - 1, sizes.block_k)
    lax.fori_loop(inputs.begin[row, block], jnp.minimum(end, blocks), visit_block, None)


def _over_tiles(length: int, visit: Callable[[Ref], None]) -> None:
    def tile(n: Array, _: None) -> None:
        visit(pl.ds(pl.multiple_of(n * _LANES, _LANES), _LANES))

    lax.fori_loop(0, length // _LANES, tile, None)


def _grid(inputs: _Inputs, sizes: _Sizes, **specs: Any) -> pltpu.PrefetchScalarGridSpec:
    in_specs = [*specs.pop("in_specs")]
    inputs_specs: _Inputs = in_specs.pop(0)
    return pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1,
        grid=_programs(inputs, sizes),
        in_specs=[*inputs_specs[1:], *in_specs],
        **specs,
    )


def _programs(inputs: _Inputs, sizes: _Sizes) -> tuple[int, int, int]:
    """Rows, key/value heads, and blocks of queries."""
    batch, _, queries = inputs.query.shape
    return batch, sizes.kv_heads, queries // sizes.block_q


def _specs(inputs: _Inputs, sizes: _Sizes) -> _Inputs:
    keys, shared = inputs.key.shape[2], len(inputs.first) == 1
    return _Inputs(
        begin=None,
        first=pl.BlockSpec((1, 1, sizes.block_q), lambda b, h, i, *_: (0 if shared else b, 0, i)),
        query=pl.BlockSpec(
            (1, sizes.group * sizes.rows, sizes.block_q), lambda b, h, i, *_: (b, h, i)
        ),
        key=pl.BlockSpec((1, sizes.rows, keys), lambda b, h, i, *_: (b, h, 0)),
        value=pl.BlockSpec((1, keys, sizes.value_dim), lambda b, h, i, *_: (b, 0, h)),
    )


def _output_spec(sizes: _Sizes) -> pl.BlockSpec:
    return pl.BlockSpec(
        (1, sizes.block_q, sizes.group * sizes.value_dim), lambda b, h, i, *_: (b, i, h)
    )


def _log_sum_spec(sizes: _Sizes) -> pl.BlockSpec:
    return pl.BlockSpec((1, 1, sizes.group, sizes.block_q), lambda b, h, i, *_: (b, h, 0, i))


def _cost(inputs: _Inputs, sizes: _Sizes, widths: int, hbm_bytes: int) -> pl.CostEstimate:
    """Of a kernel with matmuls of `widths` channels in all for each score that it computes."""
    batch, _, queries = inputs.query.shape
    keys = inputs.key.shape[2] - sizes.offset
    visits = visited_blocks(sizes.start, queries, keys, sizes.window, sizes.block_q, sizes.block_k)
    seen = queries * sizes.offset + visits * sizes.block_q * sizes.block_k
    scores = batch * sizes.kv_heads * sizes.group * seen
    return kernel_cost(2 * widths * scores, scores, hbm_bytes)


def _params(inputs: _Inputs, sizes: _Sizes) -> pltpu.CompilerParams:
    keys, itemsize = inputs.key.shape[2], inputs.key.dtype.itemsize
    return pltpu.CompilerParams(
        dimension_semantics=("parallel", "parallel", "arbitrary"),
        vmem_limit_bytes=_vmem_bytes(keys, sizes.rows, sizes.value_dim, itemsize),
    )


def _vmem_bytes(keys: int, head_dim: int, value_dim: int, itemsize: int) -> int:
    """What the backward pass needs: two buffers of keys, values and their gradients, the transposed
    keys, and the sums in float32."""
    rows, value_dim = _whole(head_dim, _ROWS), _whole(value_dim, _LANES)
    of_key = 4 * (rows + value_dim) * itemsize
    of_key += _whole(rows, _LANES) * (itemsize + 4) + value_dim * 4
    return _VMEM + keys * of_key


def _whole(length: int, tile: int) -> int:
    return pl.cdiv(length, tile) * tile


def _pad(x: Array, tiles: dict[int, int]) -> Array:
    """Zeros behind, up to multiples of these along these axes."""
    return jnp.pad(x, [(0, -n % tiles.get(axis, 1)) for axis, n in enumerate(x.shape)])
