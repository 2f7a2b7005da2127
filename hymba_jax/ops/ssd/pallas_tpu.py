"""SSD as Pallas kernels for TPUs: every sequence is read once and written once.

The grid runs over rows, chunks of positions and blocks of heads; the states of all heads stay in
VMEM between chunks, so that B and C are fetched once per group and chunk, and their products, the
scores, are computed once for all heads of the group. A decay is the exponential of a difference of
sums that start anew in each chunk and document, and never of a positive number.

Inside a chunk channels lie along sublanes and positions along lanes: what there is one of per
position and head, such as its time step, is a row, which loads broadcast over the channels.

Operands of matmuls have the dtype of x, sums are in float32. The gradient keeps only the states
before chunks, in the dtype of x, too. Its kernel takes the chunks in reverse.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from hymba_jax.ops.documents import Documents
from hymba_jax.ops.exp2 import LOG2_E
from hymba_jax.ops.kernel_cost import block_bytes, kernel_cost
from hymba_jax.ops.precision import kernel_dot
from hymba_jax.ops.remat import SCAN, named
from hymba_jax.types import Array, Float

# Positions per chunk: as many as lanes, and as rows of a matrix unit.
_CHUNK = 128
_SUBLANES, _LANES = 8, 128  # of a tile of float32
# What head_dim is filled up to a multiple of: the rows of a tile of bfloat16.
_ROWS = 16
# At most, bytes of a position's channels per block, and channels of the heads scheduled together.
_MAX_BLOCK, _MAX_TOGETHER = 4096, 256
# Bytes of VMEM for all but what is carried from chunk to chunk.
_VMEM = 32 * 2**20

# A VMEM ref, a shape or a BlockSpec of an array, depending on the stage.
Ref = Any


class _Sizes(NamedTuple):
    """Static properties.

    Attributes:
      head_dim: channels of a head, filled up to whole tiles.
      heads: in a block, all of one group.
      together: of them, scheduled together: the latencies of one are the time of the others.
    """

    head_dim: int
    heads: int
    together: int


class _Inputs(NamedTuple):
    """What the kernels read, in whole chunks, blocks and tiles.

    There are `blocks` of heads in all, in the order of the groups, and `rows` heads in each.
    """

    x: Ref  # (batch, length, channels)
    delta: Ref  # (batch, blocks, rows, length)
    exponent: Ref  # (batch, blocks, rows, length): delta A
    B: Ref  # (batch, groups, length, state), as is C
    C: Ref
    D: Ref  # (blocks, rows, 1)
    initial_state: Ref  # (batch, blocks, channels of a block, state)
    document: Ref  # (batch, 1, length): how many start in the chunk up to a position; or None
    document_state: Ref  # the state that documents start from; or None


class _Chunk(NamedTuple):
    """What is computed once for all heads of a group, in VMEM: position j, read by i."""

    reads: Ref  # (j, i): 1 where i reads j, else 0
    scores: Ref  # (j, i): B_j C_i there, else 0


class _Rows(NamedTuple):
    """What there is one of per head of a block, in VMEM.

    A chunk reads one state from before it and, with documents, another that they start from.
    """

    total: Ref  # (rows, positions): sums of the exponents, in base 2
    total_column: Ref  # (positions, rows): the same
    to_end: Ref  # (rows, positions): decay up to the end of the chunk
    from_start: tuple[Ref, ...]  # (rows, positions): with which a position reads each state
    kept: tuple[Ref, ...]  # (rows, state): with which the state after the chunk has each


class _ChunkGradients(NamedTuple):
    """Sums over the heads of a group, in VMEM."""

    scores: Ref  # (j, i)
    B: Ref  # (positions, state), as is C, without what goes through the scores
    C: Ref


class _RowGradients(NamedTuple):
    """What the sums of the exponents gain, in VMEM: to be added up, but for `total`."""

    total: Ref  # (rows, positions)
    to_end: Ref  # (rows, positions)
    kept: Ref  # (rows, state)


def ssd_pallas_tpu(
    x: Float[Array, "batch length ssm_heads ssm_head_dim"],
    dt: Float[Array, "batch length ssm_heads"],
    A: Float[Array, "ssm_heads"],
    B: Float[Array, "batch length ssm_groups state"],
    C: Float[Array, "batch length ssm_groups state"],
    D: Float[Array, "ssm_heads"] | None = None,
    dt_bias: Float[Array, "ssm_heads"] | None = None,
    initial_state: Float[Array, "batch ssm_heads ssm_head_dim state"] | None = None,
    documents: Documents | None = None,
) -> tuple[
    Float[Array, "batch length ssm_heads ssm_head_dim"],
    Float[Array, "batch ssm_heads ssm_head_dim state"],
]:
    """`ssd` with the skip inside the kernel. Operands of its matmuls are rounded to x's dtype."""
    batch, length, heads, head_dim = x.shape
    groups, state = B.shape[2:]
    of_group = heads // groups
    whole_length, whole_state = _whole(length, _CHUNK), _whole(state, _LANES)
    whole_dim = _whole(head_dim, _ROWS)
    whole_of_group = _whole(of_group, _LANES // math.gcd(_LANES, whole_dim))
    in_block = _whole_tiles(whole_of_group, whole_dim, _MAX_BLOCK // x.dtype.itemsize)
    sizes = _Sizes(whole_dim, in_block, _whole_tiles(in_block, whole_dim, _MAX_TOGETHER))
    blocks, rows = groups * whole_of_group // in_block, _whole(in_block, _SUBLANES)

    def of_heads(v: Array) -> Array:
        """(..., heads) as (..., blocks, rows)."""
        v = v.astype(jnp.float32).reshape(*v.shape[:-1], groups, of_group)
        v = _pad(v, groups, whole_of_group).reshape(*v.shape[:-2], blocks, in_block)
        return _pad(v, blocks, rows)

    def of_positions(v: Array) -> Array:
        """(batch, length, heads) as (batch, blocks, rows, length)."""
        return jnp.moveaxis(_pad(of_heads(v), whole_length, blocks, rows), 1, 3)

    def of_group_positions(v: Array) -> Array:
        v = jnp.moveaxis(v.astype(x.dtype), 2, 1)
        return _pad(v, whole_length, whole_state)

    def of_states(v: Array) -> Array:
        v = v.astype(jnp.float32).reshape(batch, groups, of_group, head_dim, state)
        v = _pad(v, whole_of_group, whole_dim, whole_state)
        return v.reshape(batch, blocks, in_block * whole_dim, whole_state)

    dt = dt.astype(jnp.float32)
    if dt_bias is not None:
        dt = dt + dt_bias.astype(jnp.float32)[None, None]
    delta = jax.nn.softplus(dt)
    if initial_state is None:
        initial_state = jnp.zeros((batch, heads, head_dim, state))
    document = document_state = None
    if documents is not None:
        starts = _pad(documents.starts.astype(jnp.float32), whole_length)
        document = starts.reshape(batch, -1, _CHUNK).cumsum(2).reshape(batch, 1, -1)
        document_state = of_states(documents.state)
    channels = _pad(
        x.reshape(batch, length, groups, of_group, head_dim),
        *(whole_length, groups, whole_of_group, whole_dim),
    )
    y, final_state = _ssd(
        _Inputs(
            x=channels.reshape(batch, whole_length, -1),
            delta=of_positions(delta),
            exponent=of_positions(delta * A.astype(jnp.float32)[None, None]),
            B=of_group_positions(B),
            C=of_group_positions(C),
            D=of_heads(jnp.zeros(heads) if D is None else D)[..., None],
            initial_state=of_states(initial_state),
            document=document,
            document_state=document_state,
        ),
        sizes,
    )
    y = y.reshape(channels.shape)[:, :length, :, :of_group, :head_dim]
    final_state = final_state.reshape(batch, groups, whole_of_group, whole_dim, whole_state)
    final_state = final_state[:, :, :of_group, :head_dim, :state]
    return y.reshape(x.shape), final_state.reshape(batch, heads, head_dim, state)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _ssd(inputs: _Inputs, sizes: _Sizes) -> tuple[Array, Array]:
    y, final_state = _forward(inputs, sizes, keep_chunk_states=False)
    return y, final_state


def _ssd_fwd(inputs: _Inputs, sizes: _Sizes) -> tuple[tuple[Array, Array], tuple[_Inputs, Array]]:
    results = _forward(inputs, sizes, keep_chunk_states=True)
    y, final_state, chunk_states = named(SCAN, results)
    return (y, final_state), (inputs._replace(initial_state=None), chunk_states)


def _ssd_bwd(
    sizes: _Sizes, residuals: tuple[_Inputs, Array], cotangents: tuple[Array, Array]
) -> tuple[_Inputs]:
    return (_backward(*residuals, *cotangents, sizes),)


_ssd.defvjp(_ssd_fwd, _ssd_bwd)


def _forward(inputs: _Inputs, sizes: _Sizes, *, keep_chunk_states: bool) -> tuple[Array, ...]:
    """y, the final state and, if they are to be kept, the states before each chunk."""
    batch, chunks, *_ = grid = _grid(inputs)
    blocks = inputs.delta.shape[1]
    specs, chunk_state_spec = _specs(inputs, sizes, lambda step: step)
    width, state = inputs.initial_state.shape[2:]
    shapes = [
        inputs.x,
        inputs.initial_state,
        jax.ShapeDtypeStruct((batch, chunks, blocks, width, state), inputs.x.dtype),
    ]
    outputs = 3 if keep_chunk_states else 2
    out_specs = [specs.x, _state_spec(inputs, sizes, chunks - 1), chunk_state_spec][:outputs]
    sources = 1 if inputs.document is None else 2
    return pl.pallas_call(
        partial(_forward_kernel, sizes=sizes),
        grid=grid,
        in_specs=[specs],
        out_specs=out_specs,
        out_shape=[jax.ShapeDtypeStruct(v.shape, v.dtype) for v in shapes][:outputs],
        scratch_shapes=[
            [pltpu.VMEM((blocks, width, state), jnp.float32)] * sources,
            _chunk_scratch(),
            _rows_scratch(inputs),
        ],
        compiler_params=_params(sources * blocks * width * state),
        cost_estimate=_cost(
            inputs,
            sizes,
            _CHUNK + (1 + sources) * state,
            1,
            block_bytes(grid, [specs, out_specs], [inputs, shapes[:outputs]]),
        ),
        name="ssd_forward",
    )(inputs)


def _forward_kernel(inputs: _Inputs, y_ref: Ref, final_ref: Ref, *refs: Ref, sizes: _Sizes) -> None:
    *borders_refs, states, chunk, rows = refs
    step, block = pl.program_id(1), _block()
    dtype, states = inputs.x.dtype, [state.at[block] for state in states]

    @pl.when(step == 0)
    def _() -> None:
        for state, first in zip(
            states, (inputs.initial_state, inputs.document_state), strict=False
        ):
            state[...] = first[0, 0]

    _prepare(inputs, chunk, rows)

    for n in range(sizes.heads // sizes.together):
        at, spread = _channels(n, sizes), partial(_spread, n=n, sizes=sizes)
        x = inputs.x[0, :, at].T.astype(jnp.float32)
        u = x * spread(inputs.delta.at[0, 0])
        low, added = u.astype(dtype), (u * spread(rows.to_end)).astype(dtype)
        y = spread(inputs.D.at[0]) * x + jnp.concatenate(
            [
                kernel_dot(low[of_head], (_decay(rows, h) * chunk.scores[...]).astype(dtype))
                for h, of_head in _heads(n, sizes)
            ]
        )
        kept = kernel_dot(added, inputs.B[0, 0])
        for borders_ref in borders_refs:
            borders_ref[0, 0, 0, at] = states[0][at].astype(dtype)
        for state, from_start, keep in zip(states, rows.from_start, rows.kept, strict=True):
            y += spread(from_start) * kernel_dot(state[at].astype(dtype), inputs.C[0, 0], (1, 1))
            kept += spread(keep) * state[at]
        states[0][at] = kept
        y_ref[0, :, at] = y.astype(dtype).T

    @pl.when(step == pl.num_programs(1) - 1)
    def _() -> None:
        final_ref[0, 0] = states[0][...]


def _backward(inputs: _Inputs, chunk_states: Array, dy: Array, dh: Array, sizes: _Sizes) -> _Inputs:
    """The gradient of each input, given the states before chunks and the cotangents."""
    _, chunks, *_ = grid = _grid(inputs)
    blocks = inputs.delta.shape[1]
    specs, chunk_state_spec = _specs(inputs, sizes, lambda step: chunks - 1 - step)
    width, state = dh.shape[2:]
    sources = 1 if inputs.document is None else 2
    first, last = (_state_spec(inputs, sizes, step) for step in (0, chunks - 1))
    shapes = jax.tree.map(lambda v: jax.ShapeDtypeStruct(v.shape, v.dtype), inputs)
    # One for each position, to be summed.
    shapes = shapes._replace(D=shapes.delta, initial_state=dh, document=None)
    in_specs = [specs._replace(initial_state=None), chunk_state_spec, specs.x, first]
    out_specs = specs._replace(D=specs.delta, initial_state=last, document=None)
    if sources > 1:
        out_specs = out_specs._replace(document_state=last)
    operands = (inputs, chunk_states, dy, dh)

    def scratch(rows: int, columns: int) -> Ref:
        return pltpu.VMEM((rows, columns), jnp.float32)

    rows = inputs.delta.shape[2]
    carried = pltpu.VMEM((blocks, width, state), jnp.float32)
    (gradients,) = pl.pallas_call(
        partial(_backward_kernel, sizes=sizes),
        grid=grid,
        in_specs=in_specs,
        out_specs=[out_specs],
        out_shape=[shapes],
        scratch_shapes=[
            [carried] * (sources - 1),
            [carried] * sources,
            _chunk_scratch(),
            _ChunkGradients(scratch(_CHUNK, _CHUNK), *[scratch(_CHUNK, state)] * 2),
            _rows_scratch(inputs),
            _RowGradients(scratch(rows, _CHUNK), scratch(rows, _CHUNK), scratch(rows, state)),
        ],
        compiler_params=_params((2 * sources - 1) * blocks * width * state),
        cost_estimate=_cost(
            inputs,
            sizes,
            3 * _CHUNK + (2 + 3 * sources) * state,
            3,
            block_bytes(grid, [in_specs, out_specs], [operands, shapes]),
        ),
        name="ssd_backward",
    )(*operands)
    return gradients._replace(D=gradients.D.sum((0, 3))[..., None])


def _backward_kernel(
    inputs: _Inputs,
    border_ref: Ref,
    dy_ref: Ref,
    final_dh_ref: Ref,
    gradients: _Inputs,
    document_states: list[Ref],
    dstates: list[Ref],
    chunk: _Chunk,
    dchunk: _ChunkGradients,
    rows: _Rows,
    drows: _RowGradients,
    *,
    sizes: _Sizes,
) -> None:
    step, block = pl.program_id(1), _block()
    dstates = [dstate.at[block] for dstate in dstates]
    states = [border_ref.at[0, 0, 0], *(state.at[block] for state in document_states)]
    B, C, dtype = inputs.B[0, 0], inputs.C[0, 0], inputs.x.dtype

    @pl.when(step == 0)
    def _() -> None:
        dstates[0][...] = final_dh_ref[0, 0]
        for dstate, state in zip(dstates[1:], states[1:], strict=True):
            state[...] = inputs.document_state[0, 0]
            dstate[...] = jnp.zeros(dstate.shape, dstate.dtype)

    _prepare(inputs, chunk, rows)

    @pl.when(pl.program_id(3) == 0)
    def _() -> None:
        for ref in dchunk:
            ref[...] = jnp.zeros(ref.shape, ref.dtype)

    for n in range(sizes.heads // sizes.together):
        at, spread = _channels(n, sizes), partial(_spread, n=n, sizes=sizes)
        put_sums = partial(_put_sums, n=n, sizes=sizes)
        x, dy_low = inputs.x[0, :, at].T.astype(jnp.float32), dy_ref[0, :, at].T
        dy, delta = dy_low.astype(jnp.float32), spread(inputs.delta.at[0, 0])
        low, dh = (x * delta).astype(dtype), dstates[0][at]
        # The sums over i and over j of what the exponents gain cancel where the same rounded
        # operands are in both.
        u, to_end, dh_low = low.astype(jnp.float32), spread(rows.to_end), dh.astype(dtype)
        end = to_end * kernel_dot(dh_low, B, (1, 1))
        of_heads: list[tuple[Array, Array]] = []
        for h, of_head in _heads(n, sizes):
            decay = _decay(rows, h)
            weights = (decay * chunk.scores[...]).astype(dtype)
            of_heads.append(
                (
                    kernel_dot(low[of_head], weights),
                    kernel_dot(dy_low[of_head], weights, (1, 1)),
                )
            )
            dchunk.scores[...] += decay * kernel_dot(low[of_head].T, dy_low[of_head])
        y, du = (jnp.concatenate(v) for v in zip(*of_heads, strict=True))
        du += end
        dchunk.B[...] += kernel_dot((u * to_end).astype(dtype).T, dh_low)
        gained = jnp.zeros(dh.shape)
        for s, (state, dstate) in enumerate(zip(states, dstates, strict=True)):
            from_start, kept = spread(rows.from_start[s]), spread(rows.kept[s])
            state_low, dread = state[at].astype(dtype), (dy * from_start).astype(dtype)
            y += from_start * kernel_dot(state_low, C, (1, 1))
            gained += dh * kept * state[at]
            dchunk.C[...] += kernel_dot(dread.T, state_low)
            dstate[at] = (dstate[at] if s else 0) + kept * dh + kernel_dot(dread, C)
        dx = delta * du + spread(inputs.D.at[0]) * dy
        gradients.x[0, :, at] = dx.astype(dtype).T
        put_sums(gradients.delta.at[0, 0], x * du)
        put_sums(gradients.D.at[0, 0], x * dy)
        put_sums(drows.total, dy * y - u * du)
        put_sums(drows.to_end, u * end)
        put_sums(drows.kept, gained)

    gradients.exponent[0, 0] = _dexponent(chunk, drows)

    @pl.when(pl.program_id(3) == pl.num_programs(3) - 1)
    def _() -> None:
        dscores = jnp.where(chunk.reads[...] > 0, dchunk.scores[...], 0).astype(dtype)
        gradients.B[0, 0] = (dchunk.B[...] + kernel_dot(dscores, C)).astype(dtype)
        gradients.C[0, 0] = (dchunk.C[...] + kernel_dot(dscores.T, B)).astype(dtype)

    @pl.when(step == pl.num_programs(1) - 1)
    def _() -> None:
        for gradient, dstate in zip(
            (gradients.initial_state, gradients.document_state), dstates, strict=False
        ):
            gradient[0, 0] = dstate[...]


def _prepare(inputs: _Inputs, chunk: _Chunk, rows: _Rows) -> None:
    """Fills `chunk`, before the first block of a group, and `rows`."""

    @pl.when(pl.program_id(3) == 0)
    def _() -> None:
        square = (_CHUNK, _CHUNK)
        j, i = (lax.broadcasted_iota(jnp.int32, square, axis) for axis in (0, 1))
        reads = j <= i
        if inputs.document is not None:
            document = jnp.broadcast_to(inputs.document[0], square)
            reads &= document == document.T
        chunk.reads[...] = reads.astype(jnp.float32)
        chunk.scores[...] = jnp.where(reads, kernel_dot(inputs.B[0, 0], inputs.C[0, 0], (1, 1)), 0)

    total = kernel_dot(inputs.exponent[0, 0], chunk.reads[...]) * LOG2_E
    last = total[:, -1:]
    from_start, to_end = jnp.exp2(total), jnp.exp2(jnp.minimum(last - total, 0))
    kept = jnp.broadcast_to(jnp.exp2(last), rows.kept[0].shape)
    rows.total[...], rows.total_column[...] = total, total.T
    if inputs.document is None:
        rows.to_end[...], rows.from_start[0][...], rows.kept[0][...] = to_end, from_start, kept
        return
    document = jnp.broadcast_to(inputs.document[0], total.shape)
    last_document = document[:, -1:]
    rows.to_end[...] = jnp.where(document == last_document, to_end, 0)
    for ref, decay, of in (
        (rows.from_start, from_start, document),
        (rows.kept, kept, jnp.broadcast_to(last_document, kept.shape)),
    ):
        ref[0][...] = jnp.where(of == 0, decay, 0)
        ref[1][...] = jnp.where(of == 0, 0, decay)


def _decay(rows: _Rows, h: int) -> Float[Array, "j i"]:
    """From position j to i, if that is later in the same document, else a number up to 1."""
    between = rows.total[h : h + 1] - rows.total_column[:, h : h + 1]
    return jnp.exp2(jnp.minimum(between, 0))


def _dexponent(chunk: _Chunk, drows: _RowGradients) -> Float[Array, "rows positions"]:
    """What the exponents gain, of which `total` has sums, also the last one."""
    dlast = sum(ref[...].sum(1, keepdims=True) for ref in (drows.to_end, drows.kept))
    lane = lax.broadcasted_iota(jnp.int32, drows.total.shape, 1)
    dtotal = drows.total[...] + jnp.where(lane == _CHUNK - 1, dlast, 0)
    return kernel_dot(dtotal, chunk.reads[...], (1, 1))


def _heads(n: int, sizes: _Sizes) -> list[tuple[int, slice]]:
    """Those scheduled together, and the channels of each among theirs."""
    of_head = (slice(t * sizes.head_dim, (t + 1) * sizes.head_dim) for t in range(sizes.together))
    return [(n * sizes.together + t, channels) for t, channels in enumerate(of_head)]


def _channels(n: int, sizes: _Sizes) -> slice:
    width = sizes.together * sizes.head_dim
    return slice(n * width, (n + 1) * width)


def _spread(ref: Ref, n: int, sizes: _Sizes) -> Array:
    """The rows of the heads scheduled together, each once per channel."""
    width = ref.shape[1]
    rows = [ref[h : h + 1] for h, _ in _heads(n, sizes)]
    return jnp.concatenate([jnp.broadcast_to(row, (sizes.head_dim, width)) for row in rows])


def _put_sums(ref: Ref, terms: Array, n: int, sizes: _Sizes) -> None:
    """Sets the rows of the heads scheduled together to sums over channels."""
    for h, of_head in _heads(n, sizes):
        ref[h : h + 1] = terms[of_head].sum(0, keepdims=True)


def _grid(inputs: _Inputs) -> tuple[int, int, int, int]:
    """Rows, chunks, groups, blocks of a group's heads."""
    batch, blocks, _, length = inputs.delta.shape
    groups = inputs.B.shape[1]
    return batch, length // _CHUNK, groups, blocks // groups


def _block() -> Array:
    """Which of the blocks of all groups this is."""
    return pl.program_id(2) * pl.num_programs(3) + pl.program_id(3)


def _whole_tiles(heads: int, head_dim: int, most: int) -> int:
    """The most heads whose channels are whole tiles, that divide `heads` and have no more channels
    than `most`, except for a single tile."""
    tile = _LANES // math.gcd(_LANES, head_dim)
    sizes = range(tile, max(tile, most // head_dim) + 1, tile)
    return max(size for size in sizes if heads % size == 0)


def _specs(
    inputs: _Inputs, sizes: _Sizes, chunk: Callable[[Array], Array]
) -> tuple[_Inputs, pl.BlockSpec]:
    """The blocks of the inputs and of the states before chunks, which come in this order."""
    rows, state = inputs.delta.shape[2], inputs.B.shape[3]
    width, of_group = sizes.heads * sizes.head_dim, _grid(inputs)[3]
    positions = pl.BlockSpec(
        (1, 1, rows, _CHUNK), lambda b, t, g, k: (b, g * of_group + k, 0, chunk(t))
    )
    projections = pl.BlockSpec((1, 1, _CHUNK, state), lambda b, t, g, k: (b, g, chunk(t), 0))
    document = pl.BlockSpec((1, 1, _CHUNK), lambda b, t, g, k: (b, 0, chunk(t)))
    states = _state_spec(inputs, sizes, 0)
    specs = _Inputs(
        x=pl.BlockSpec((1, _CHUNK, width), lambda b, t, g, k: (b, chunk(t), g * of_group + k)),
        delta=positions,
        exponent=positions,
        B=projections,
        C=projections,
        D=pl.BlockSpec((1, rows, 1), lambda b, t, g, k: (g * of_group + k, 0, 0)),
        initial_state=states,
        document=None if inputs.document is None else document,
        document_state=None if inputs.document_state is None else states,
    )
    return specs, pl.BlockSpec(
        (1, 1, 1, width, state), lambda b, t, g, k: (b, chunk(t), g * of_group + k, 0, 0)
    )


def _state_spec(inputs: _Inputs, sizes: _Sizes, step: int) -> pl.BlockSpec:
    """Of states that are read or written in one step only."""
    width, of_group = sizes.heads * sizes.head_dim, _grid(inputs)[3]
    return pl.BlockSpec(
        (1, 1, width, inputs.B.shape[3]),
        lambda b, t, g, k: (b, (t == step) * (g * of_group + k), 0, 0),
    )


def _chunk_scratch() -> _Chunk:
    return _Chunk(*[pltpu.VMEM((_CHUNK, _CHUNK), jnp.float32)] * 2)


def _rows_scratch(inputs: _Inputs) -> _Rows:
    rows, state = inputs.delta.shape[2], inputs.B.shape[3]
    sources = 1 if inputs.document is None else 2
    of_positions = pltpu.VMEM((rows, _CHUNK), jnp.float32)
    of_states = pltpu.VMEM((rows, state), jnp.float32)
    column = pltpu.VMEM((_CHUNK, rows), jnp.float32)
    return _Rows(
        of_positions, column, of_positions, (of_positions,) * sources, (of_states,) * sources
    )


def _cost(
    inputs: _Inputs, sizes: _Sizes, of_head: int, of_group: int, hbm_bytes: int
) -> pl.CostEstimate:
    """Of matmuls with `of_head` contracted numbers for each channel, and as many as `of_group`
    times the scores; a position decays to each of its chunk, to its end and from its start."""
    batch, blocks, _, length = inputs.delta.shape
    groups, state = inputs.B.shape[1], inputs.B.shape[3]
    heads = blocks * sizes.heads
    flops = 2 * heads * sizes.head_dim * of_head + 2 * groups * _CHUNK * state * of_group
    positions = batch * length
    return kernel_cost(positions * flops, positions * heads * (_CHUNK + 2), hbm_bytes)


def _params(carried: int) -> pltpu.CompilerParams:
    """Of kernels with so many numbers in VMEM from chunk to chunk."""
    return pltpu.CompilerParams(
        dimension_semantics=("parallel", "arbitrary", "arbitrary", "arbitrary"),
        vmem_limit_bytes=_VMEM + 4 * carried,
    )


def _whole(length: int, tile: int) -> int:
    return pl.cdiv(length, tile) * tile


def _pad(v: Array, *sizes: int) -> Array:
    """Zeros up to these sizes of the last axes."""
    ends = [size - n for size, n in zip(sizes, v.shape[-len(sizes) :], strict=True)]
    return jnp.pad(v, [(0, 0)] * (v.ndim - len(ends)) + [(0, end) for end in ends])
