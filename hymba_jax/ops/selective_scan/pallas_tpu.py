"""The selective scan as Pallas kernels for TPUs: every sequence is read once and written once.

The grid runs over rows, groups of blocks of channels and, sequentially, chunks of time and, in
each, the blocks of a group, whose states stay in VMEM between chunks. As in HBM, channels lie along
lanes; states lie along sublanes. The recurrence is bound by arithmetic slots: `_put_columns` and
`_prepare` store its operands in VMEM so that loads broadcast them over tiles.

The matrix units, for which a recurrence has no use, take the sums over states and over channels
(`tpu_terms`), of an iteration of 16 positions at a time. Where x, B and C are in bfloat16, so are
their operands, as those of the model's matmuls; the recurrence is in float32. A sum has zeros for
the other positions, so that what is not finite spoils all 16.

The gradient keeps only the states between chunks. Its kernel takes the chunks in reverse,
recomputes the states of each, and walks back over them.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from hymba_jax.ops.documents import Documents
from hymba_jax.ops.exp2 import LOG2_E
from hymba_jax.ops.kernel_cost import block_bytes
from hymba_jax.ops.platform import device_kind
from hymba_jax.ops.remat import SCAN, named
from hymba_jax.ops.selective_scan.cost import backward_cost, forward_cost
from hymba_jax.ops.selective_scan.softplus import softplus
from hymba_jax.ops.selective_scan.tpu_terms import (
    LANES,
    POSITIONS,
    Index,
    Ref,
    add_own_states,
    columns_of,
    from_packed_order,
    matmul_dtype,
    over_lanes,
    put_terms,
    spread,
    sum_over_channels,
    sum_over_states,
    terms_shape,
    to_packed_order,
    to_rows,
)
from hymba_jax.types import Array, Float

# A tile is 8 sublanes by 128 lanes.
_SUBLANES = 8
# Positions per chunk, and times states: longer ones have less of what is done once a chunk, until
# the states take too much VMEM. Chips of these kinds have 16 MiB.
_MAX_CHUNK, _MAX_CHUNK_STATES = 256, 256 * 32
_SMALL_VMEM, _SMALL_CHUNK = ("TPU v2", "TPU v3", "TPU v4", "TPU v4 lite"), 64
# Channels and states per block: a wider one has more tiles for the latencies of each, until the
# states take too many registers, and those of a chunk too much VMEM.
_MAX_BLOCK, _MAX_STATES = 640, 640 * 16
# Blocks per group. VMEM holds the states of all.
_MAX_GROUP = 8
# Scheduled together: positions of the recurrence, and iterations of loops without one.
_UNROLL_POSITIONS, _UNROLL_ITERATIONS = POSITIONS, 4
# Unasked, a kernel has 16 MiB. The gradient of 16 states takes 23, in float32 30.
_PARAMS = pltpu.CompilerParams(
    dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"),
    vmem_limit_bytes=48 * 2**20,
)


class _Inputs(NamedTuple):
    """What the kernels read. All but x, dt and z are padded to whole tiles, chunks and blocks."""

    x: Ref  # (batch, length, channels), as are dt and z
    dt: Ref
    z: Ref  # or None
    B: Ref  # (batch, chunks, iterations, row), see `tpu_terms`, as is C
    C: Ref
    starts: Ref  # the same: zeros, and a 1 in a position's first column if a document starts there
    A: Ref  # (state, channels)
    D: Ref  # (1, channels), as is dt_bias
    dt_bias: Ref
    initial_state: Ref  # (batch, state, channels)
    document_state: Ref  # the state that documents start from; or None


class _Steps(NamedTuple):
    """Operands of the recurrence in VMEM, laid out for broadcasting loads."""

    delta: Ref  # (tiles, positions, lanes), as is u
    u: Ref
    B: Ref  # (positions, states, lanes), as is C
    C: Ref  # None in the forward pass
    starts: Ref  # (positions, lanes); or None
    document_state: Ref  # or None
    # A is in base 2, which saves one multiplication per exponential. What a kernel has written is
    # loaded in each step; an input would occupy registers throughout.
    rates: Ref
    terms: Ref  # of an iteration: states, and walking back their gradients


def selective_scan_pallas_tpu(
    x: Float[Array, "batch length channels"],
    dt: Float[Array, "batch length channels"],
    A: Float[Array, "state channels"],
    B: Float[Array, "batch length state"],
    C: Float[Array, "batch length state"],
    D: Float[Array, "channels"] | None = None,
    z: Float[Array, "batch length channels"] | None = None,
    dt_bias: Float[Array, "channels"] | None = None,
    initial_state: Float[Array, "batch state channels"] | None = None,
    documents: Documents | None = None,
) -> tuple[Float[Array, "batch length channels"], Float[Array, "batch state channels"]]:
    """`selective_scan` with the softplus, the skip and the gate inside the kernel."""
    batch, length, channels = x.shape
    state, block = A.shape[0], _block(A.shape[0], channels)
    # Of y. The matmuls' operands have the dtype of the kernels' x.
    of_y, x = x.dtype, x.astype(jnp.result_type(x, B, C))
    chunk, dtype = _chunk(length, state), matmul_dtype(x.dtype)

    def of_positions(v: Array) -> Array:
        return to_rows(_pad(v, chunk, POSITIONS), chunk)

    def of_channels(v: Array | None) -> Array:
        v = jnp.zeros(channels) if v is None else v
        return _pad(v.astype(jnp.float32)[None], 1, block)

    def of_states(v: Array) -> Array:
        return to_packed_order(_pad(v.astype(jnp.float32), POSITIONS, block), dtype)

    if initial_state is None:
        initial_state = jnp.zeros((batch, state, channels))
    starts = document_state = None
    if documents is not None:
        starts = of_positions(documents.starts[..., None].astype(jnp.float32))
        document_state = of_states(documents.state)
    y, final_state = _scan(
        _Inputs(
            x=x,
            dt=dt,
            z=z,
            B=of_positions(B),
            C=of_positions(C),
            starts=starts,
            A=of_states(A),
            D=of_channels(D),
            dt_bias=of_channels(dt_bias),
            initial_state=of_states(initial_state),
            document_state=document_state,
        )
    )
    return y.astype(of_y), from_packed_order(final_state, dtype)[:, :state, :channels]


@jax.custom_vjp
def _scan(inputs: _Inputs) -> tuple[Array, Array]:
    y, final_state = _forward(inputs, keep_chunk_states=False)
    return y, final_state


def _scan_fwd(inputs: _Inputs) -> tuple[tuple[Array, Array], tuple[_Inputs, Array]]:
    y, final_state, chunk_states = named(SCAN, _forward(inputs, keep_chunk_states=True))
    return (y, final_state), (inputs, chunk_states)


def _scan_bwd(residuals: tuple[_Inputs, Array], cotangents: tuple[Array, Array]) -> tuple[_Inputs]:
    return (_backward(*residuals, *cotangents),)


_scan.defvjp(_scan_fwd, _scan_bwd)


def _forward(inputs: _Inputs, *, keep_chunk_states: bool) -> tuple[Array, ...]:
    """y, the final state and, if they are to be kept, the states before each chunk."""
    batch, _, chunks, _ = grid = _grid(inputs)
    specs, chunk_state_spec = _specs(inputs, lambda step: step)
    h = inputs.initial_state
    shapes = [inputs.x, h, jax.ShapeDtypeStruct((batch, chunks, *h.shape[1:]), h.dtype)]
    outputs = 3 if keep_chunk_states else 2
    out_specs = [specs.x, specs.initial_state, chunk_state_spec][:outputs]
    moved = block_bytes(grid, [specs, out_specs], [inputs, shapes[:outputs]])
    return pl.pallas_call(
        partial(_forward_kernel, edge=_edge(inputs)),
        grid=grid,
        in_specs=[specs],
        out_specs=out_specs,
        out_shape=[jax.ShapeDtypeStruct(v.shape, v.dtype) for v in shapes][:outputs],
        scratch_shapes=[_steps(inputs)._replace(C=None)],
        compiler_params=_PARAMS,
        cost_estimate=forward_cost(*_sizes(inputs), moved, flops=_sum_flops(inputs)),
        name="selective_scan_forward",
    )(inputs)


def _forward_kernel(inputs: _Inputs, *refs: Ref, edge: tuple[int, int] | None) -> None:
    # A block that is the same in every chunk stays in VMEM until the last: `h_ref` carries.
    y_ref, h_ref, *borders_refs, steps = refs
    dtype = matmul_dtype(y_ref.dtype)
    lanes = _own_lanes(y_ref)
    inputs, h_ref = _own(inputs, lanes), h_ref.at[:, :, lanes]
    chunk = pl.program_id(2)
    valid_rows = _valid_rows(edge, chunk, *y_ref.shape[1:])

    @pl.when(chunk == 0)
    def _() -> None:
        h_ref[0] = inputs.initial_state[0]

    for borders_ref in borders_refs:
        borders_ref[0, 0] = h_ref[0]

    @pl.when(pl.program_id(3) == 0)
    def _() -> None:
        _put_columns(inputs, steps)

    _prepare(inputs, steps, valid_rows)

    def advance(i: Index, tile: int, t: Index, h: Array) -> Array:
        h = _advance(steps, tile, i * POSITIONS + t, h)
        put_terms(steps.terms, tile, t, h)
        return h

    def compute(i: Index) -> None:
        for tile, lanes in _tiles_of(y_ref):
            h_ref[0, :, lanes] = _positions(partial(advance, i, tile), h_ref[0, :, lanes])

    def read(i: Index) -> None:
        rows, valid, C = _rows(i), valid_rows(i), spread(_row_of(inputs.C, i), dtype)
        for tile, lanes in _tiles_of(y_ref):
            y = sum_over_states(C, steps.terms, tile)
            y += inputs.D[:, lanes] * _read(inputs.x, rows, lanes, valid)
            if inputs.z is not None:
                y = y * jax.nn.silu(_read(inputs.z, rows, lanes, valid))
            y_ref[0, rows, lanes] = y.astype(y_ref.dtype)

    _overlap(compute, read, iterations=inputs.C.shape[2])


def _backward(inputs: _Inputs, chunk_states: Array, dy: Array, dh: Array) -> _Inputs:
    """The gradient of each input, given the states before chunks and the cotangents."""
    batch, groups, chunks, _ = grid = _grid(inputs)
    specs, chunk_state_spec = _specs(inputs, lambda step: chunks - 1 - step)
    # What several programs read gets a gradient from each of them, to be summed.
    positions_spec = pl.BlockSpec(
        (1, *specs.B.block_shape), lambda b, g, t, e: (b, g, chunks - 1 - t, 0, 0)
    )
    group_channels = inputs.A.shape[1] // groups
    channels_spec = pl.BlockSpec((1, _SUBLANES, group_channels), lambda b, g, t, e: (b, 0, g))
    shared = {
        "B": (positions_spec, (batch, groups, *inputs.B.shape[1:])),
        "C": (positions_spec, (batch, groups, *inputs.C.shape[1:])),
        "A": (specs.initial_state, (batch, *inputs.A.shape)),
        "D": (channels_spec, (batch, _SUBLANES, inputs.D.shape[1])),
        "dt_bias": (channels_spec, (batch, _SUBLANES, inputs.D.shape[1])),
    }
    shapes = jax.tree.map(lambda v: jax.ShapeDtypeStruct(v.shape, v.dtype), inputs)
    shapes = shapes._replace(
        starts=None, **{k: jax.ShapeDtypeStruct(v, jnp.float32) for k, (_, v) in shared.items()}
    )
    in_specs = [specs, chunk_state_spec, specs.x, specs.initial_state]
    out_specs = specs._replace(starts=None, **{k: spec for k, (spec, _) in shared.items()})
    operands = (inputs, chunk_states, dy, dh)
    steps = _steps(inputs)
    tiles, *tile = steps.rates.shape
    (gradients,) = pl.pallas_call(
        partial(_backward_kernel, edge=_edge(inputs)),
        grid=grid,
        in_specs=in_specs,
        out_specs=[out_specs],
        out_shape=[shapes],
        scratch_shapes=[
            steps,
            pltpu.VMEM((tiles, steps.u.shape[1] + 1, *tile), jnp.float32),
            steps.u,
            steps.terms,
        ],
        compiler_params=_PARAMS,
        cost_estimate=backward_cost(
            *_sizes(inputs),
            block_bytes(grid, [in_specs, out_specs], [operands, shapes]),
            flops=(4 if inputs.z is None else 5) * _sum_flops(inputs),
        ),
        name="selective_scan_backward",
    )(*operands)
    return gradients._replace(
        B=gradients.B.sum(1),
        C=gradients.C.sum(1),
        A=gradients.A.sum(0),
        D=gradients.D.sum((0, 1))[None],
        dt_bias=gradients.dt_bias.sum((0, 1))[None],
    )


def _backward_kernel(
    inputs: _Inputs,
    border_ref: Ref,
    dy_ref: Ref,
    final_dh_ref: Ref,
    gradients: _Inputs,
    steps: _Steps,
    states_ref: Ref,
    dy_ungated_ref: Ref,
    dexponents_ref: Ref,
    *,
    edge: tuple[int, int] | None,
) -> None:
    lanes = _own_lanes(dy_ref)
    inputs, gradients = _own(inputs, lanes), _own(gradients, lanes)
    final_dh_ref = final_dh_ref.at[:, :, lanes]
    step = pl.program_id(2)
    valid_rows = _valid_rows(edge, pl.num_programs(2) - 1 - step, *dy_ref.shape[1:])

    @pl.when(step == 0)
    def _() -> None:
        gradients.initial_state[0] = final_dh_ref[0]
        for sums in (gradients.A, gradients.D, gradients.dt_bias, gradients.document_state):
            if sums is not None:
                sums[...] = jnp.zeros(sums.shape, sums.dtype)

    @pl.when(pl.program_id(3) == 0)
    def _() -> None:
        _put_columns(inputs, steps)
        for sums in (gradients.B, gradients.C):
            sums[...] = jnp.zeros(sums.shape, sums.dtype)

    _prepare(inputs, steps, valid_rows)
    dtype, iterations = matmul_dtype(dy_ref.dtype), inputs.C.shape[2]

    def advance(i: Index, tile: int, t: Index, h: Array) -> Array:
        at = i * POSITIONS + t
        h = _advance(steps, tile, at, h)
        states_ref[tile, at + 1] = h
        put_terms(steps.terms, tile, t, h)
        return h

    def recompute(i: Index) -> None:
        for tile, _ in _tiles_of(dy_ref):
            _positions(partial(advance, i, tile), states_ref[tile, i * POSITIONS])

    def read(i: Index) -> None:
        rows, valid, C = _rows(i), valid_rows(i), spread(_row_of(inputs.C, i), dtype)
        dC = jnp.zeros(C.shape)
        for tile, lanes in _tiles_of(dy_ref):
            dy = _read(dy_ref, rows, lanes, valid)
            if inputs.z is not None:
                z = _read(inputs.z, rows, lanes, valid)
                gate = jax.nn.sigmoid(z)
                y = sum_over_states(C, steps.terms, tile)
                y += inputs.D[:, lanes] * _read(inputs.x, rows, lanes, valid)
                dz = dy * gate * (1 + z * (1 - gate)) * y
                gradients.z[0, rows, lanes] = dz.astype(gradients.z.dtype)
                dy = dy * z * gate
            dy_ungated_ref[tile, rows] = dy
            dC += sum_over_channels(dy, steps.terms, tile)
        add_own_states(gradients.C.at[0, 0, 0], i, dC)

    _put_tiles(states_ref.at[:, 0], border_ref[0, 0])
    _overlap(recompute, read, iterations=iterations)

    def retreat(
        i: Index, tile: int, lanes: slice, step: Index, carry: tuple[Array, Array]
    ) -> tuple[Array, Array]:
        dh, dA = carry
        t = POSITIONS - 1 - step
        at = i * POSITIONS + t
        delta = _row(steps.delta, tile, at)
        dh += steps.C[at] * _row(dy_ungated_ref, tile, at)
        put_terms(steps.terms, tile, t, dh)
        dh *= jnp.exp2(delta * steps.rates[tile])
        dexponent = dh * _before(steps, tile, at, states_ref[tile, at])
        put_terms(dexponents_ref, tile, t, dexponent * inputs.A[:, lanes])
        dA += dexponent * delta
        if steps.starts is not None:
            start = _is_start(steps, at)
            gradients.document_state[0, :, lanes] += jnp.where(start, dh, 0)
            dh = jnp.where(start, 0, dh)
        return dh, dA

    def walk_back(step: Index) -> None:
        i = iterations - 1 - step
        for tile, lanes in _tiles_of(dy_ref):
            carry = gradients.initial_state[0, :, lanes], gradients.A[0, :, lanes]
            dh, dA = _positions(partial(retreat, i, tile, lanes), carry)
            gradients.initial_state[0, :, lanes], gradients.A[0, :, lanes] = dh, dA

    def put_gradients(step: Index) -> None:
        i = iterations - 1 - step
        rows, valid, B = _rows(i), valid_rows(i), spread(_row_of(inputs.B, i), dtype)
        ones, dB = spread(jnp.ones((1, B.shape[1])), dtype), jnp.zeros(B.shape)
        for tile, lanes in _tiles_of(dy_ref):
            dB += sum_over_channels(steps.u[tile, rows], steps.terms, tile)
            du = sum_over_states(B, steps.terms, tile)
            ddelta = sum_over_states(ones, dexponents_ref, tile)
            x, dt = _read(inputs.x, rows, lanes, valid), _dt(inputs, rows, lanes, valid)
            dy = dy_ungated_ref[tile, rows]
            dx = du * steps.delta[tile, rows] + inputs.D[:, lanes] * dy
            ddt = (ddelta + du * x) * jax.nn.sigmoid(dt)
            gradients.x[0, rows, lanes] = dx.astype(gradients.x.dtype)
            gradients.dt[0, rows, lanes] = ddt.astype(gradients.dt.dtype)
            gradients.D[0, :, lanes] += _fold(dy * x)
            gradients.dt_bias[0, :, lanes] += _fold(ddt)
        add_own_states(gradients.B.at[0, 0, 0], i, dB)

    _overlap(walk_back, put_gradients, iterations=iterations)


def _overlap(
    first: Callable[[Index], None], second: Callable[[Index], None], iterations: int
) -> None:
    """Runs both for each iteration, `second` and `first` of the next together: latencies of its
    matmuls are time for that recurrence. It is traced before, and so reads terms before they are
    written anew."""
    first(0)

    def iteration(i: Index, _: None) -> None:
        second(i)
        first(i + 1)

    jax.lax.fori_loop(0, iterations - 1, iteration, None)
    second(iterations - 1)


def _positions(position: Callable[[Index, Any], Any], carry: Any) -> Any:
    """A loop over those of an iteration."""
    return jax.lax.fori_loop(0, POSITIONS, position, carry, unroll=_UNROLL_POSITIONS)


def _tiles_of(sequence: Ref) -> list[tuple[int, slice]]:
    """The tiles of a block's channels, and their lanes."""
    return [(n, slice(n * LANES, (n + 1) * LANES)) for n in range(sequence.shape[2] // LANES)]


def _fold(v: Array) -> Array:
    """The halves of an iteration's positions, added; sums over the others are left to XLA."""
    return v[:_SUBLANES] + v[_SUBLANES:]


def _prepare(inputs: _Inputs, steps: _Steps, valid_rows: Callable[[Index], Array | None]) -> None:
    """Lays out the other operands, those of a block."""
    _put_tiles(steps.rates, inputs.A[...] * LOG2_E)
    if inputs.starts is not None:
        _put_tiles(steps.document_state, inputs.document_state[0])

    def iteration(i: Index, _: None) -> None:
        rows, valid = _rows(i), valid_rows(i)
        for tile, lanes in _tiles_of(inputs.x):
            delta = softplus(_dt(inputs, rows, lanes, valid), jnp.exp)
            steps.delta[tile, rows] = delta
            steps.u[tile, rows] = delta * _read(inputs.x, rows, lanes, valid)

    jax.lax.fori_loop(0, inputs.C.shape[2], iteration, None, unroll=_UNROLL_ITERATIONS)


def _put_columns(inputs: _Inputs, steps: _Steps) -> None:
    """Lays out a chunk's B, C and starts over lanes, for all blocks of a group."""
    dtype = matmul_dtype(inputs.x.dtype)

    def iteration(i: Index, _: None) -> None:
        for ref, columns in ((inputs.B, steps.B), (inputs.C, steps.C)):
            if columns is not None:
                columns[_rows(i)] = columns_of(_row_of(ref, i), dtype)
        if steps.starts is not None:
            steps.starts[_rows(i)] = over_lanes(spread(_row_of(inputs.starts, i), dtype))

    jax.lax.fori_loop(0, inputs.C.shape[2], iteration, None, unroll=_UNROLL_ITERATIONS)


def _row_of(ref: Ref, i: Index) -> Array:
    return ref[0, 0, pl.ds(i, 1)]


def _dt(inputs: _Inputs, rows: Ref, lanes: slice, valid: Array | None) -> Array:
    # softplus(-inf) = 0, so what lies past the end leaves the state unchanged.
    return _read(inputs.dt, rows, lanes, valid, -jnp.inf) + inputs.dt_bias[:, lanes]


def _before(steps: _Steps, tile: int, at: Index, h: Array) -> Array:
    """The state before a position, given that after the position before."""
    if steps.starts is None:
        return h
    return jnp.where(_is_start(steps, at), steps.document_state[tile], h)


def _is_start(steps: _Steps, at: Index) -> Array:
    return steps.starts[pl.ds(at, 1)] > 0


def _advance(steps: _Steps, tile: int, at: Index, h: Array) -> Array:
    """The state after a position, given that after the position before."""
    decay = jnp.exp2(_row(steps.delta, tile, at) * steps.rates[tile])
    return decay * _before(steps, tile, at, h) + _row(steps.u, tile, at) * steps.B[at]


def _rows(i: Index) -> Ref:
    return pl.ds(pl.multiple_of(jnp.asarray(i * POSITIONS), POSITIONS), POSITIONS)


def _row(ref: Ref, tile: int, at: Index) -> Array:
    """A position's row, broadcast over states, which loads do at no cost."""
    return ref[tile, pl.ds(at, 1)]


def _put_tiles(ref: Ref, v: Array) -> None:
    """Stores (state, channels) as tiles of channels, (state, lanes) each."""
    ref[...] = jnp.stack(jnp.split(v, v.shape[1] // LANES, axis=1))


def _read(ref: Ref, rows: Ref, lanes: slice, valid: Array | None, otherwise: float = 0.0) -> Array:
    v = ref[0, rows, lanes].astype(jnp.float32)
    return v if valid is None else jnp.where(valid[:, lanes], v, otherwise)


def _valid_rows(
    edge: tuple[int, int] | None, chunk: Array, positions: int, block: int
) -> Callable[[Index], Array | None]:
    """From an iteration, which of its positions and channels exist; None if all do."""
    if edge is None:
        return lambda i: None
    shape = (POSITIONS, block)
    position = chunk * positions + jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    first = pl.program_id(1) * pl.num_programs(3) + pl.program_id(3)
    channel = first * block + jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    return lambda i: (position + i * POSITIONS < edge[0]) & (channel < edge[1])


def _edge(inputs: _Inputs) -> tuple[int, int] | None:
    """Length and channels, where chunks or blocks go past them."""
    _, length, channels = inputs.x.shape
    whole = (math.prod(_chunks(inputs)), inputs.A.shape[1])
    return None if (length, channels) == whole else (length, channels)


def _block(state: int, channels: int) -> int:
    """Channels per block: whole tiles, and as many in each block."""
    state = pl.cdiv(state, POSITIONS) * POSITIONS
    most = max(min(_MAX_BLOCK, _MAX_STATES // state), LANES)
    blocks = pl.cdiv(channels, most)
    return pl.cdiv(pl.cdiv(channels, blocks), LANES) * LANES


def _chunk(length: int, state: int) -> int:
    """Positions per chunk: whole iterations, and as many in each chunk."""
    state = pl.cdiv(state, POSITIONS) * POSITIONS
    most = _SMALL_CHUNK if device_kind() in _SMALL_VMEM else _MAX_CHUNK
    most = max(min(most, _MAX_CHUNK_STATES // state) // POSITIONS, 1) * POSITIONS
    chunks = pl.cdiv(length, most)
    return pl.cdiv(pl.cdiv(length, chunks), POSITIONS) * POSITIONS


def _grid(inputs: _Inputs) -> tuple[int, int, int, int]:
    """Rows, groups of blocks of channels, chunks of time, blocks of a group."""
    state, channels = inputs.A.shape
    blocks = channels // _block(state, inputs.x.shape[2])
    group = max(n for n in range(1, _MAX_GROUP + 1) if blocks % n == 0)
    return inputs.x.shape[0], blocks // group, _chunks(inputs)[0], group


def _chunks(inputs: _Inputs) -> tuple[int, int]:
    """Chunks, and positions of each."""
    return inputs.B.shape[1], inputs.B.shape[2] * POSITIONS


def _specs(inputs: _Inputs, chunk: Callable[[Array], Array]) -> tuple[_Inputs, pl.BlockSpec]:
    """The blocks of the inputs and of the states before chunks, which come in this order."""
    state = inputs.A.shape[0]
    block = _block(state, inputs.x.shape[2])
    *_, group = _grid(inputs)

    def of_block(shape: tuple[int, ...], index: Callable[..., Any]) -> pl.BlockSpec:
        return pl.BlockSpec(shape, lambda b, g, t, e: index(b, chunk(t), g * group + e))

    def of_group(*rows: int) -> pl.BlockSpec:
        """What is kept, or fetched once, for all chunks."""
        return pl.BlockSpec(
            (*rows, group * block), lambda b, g, t, e: (*(b for _ in rows[1:]), 0, g)
        )

    def rows(v: Array) -> pl.BlockSpec:
        return of_block((1, 1, *v.shape[2:]), lambda b, t, e: (b, t, 0, 0))

    sequence = of_block((1, _chunks(inputs)[1], block), lambda b, t, e: (b, t, e))

    states = of_group(1, state)
    channels = of_group(1)
    specs = _Inputs(
        x=sequence,
        dt=sequence,
        z=None if inputs.z is None else sequence,
        B=rows(inputs.B),
        C=rows(inputs.C),
        starts=None if inputs.starts is None else rows(inputs.starts),
        A=of_group(state),
        D=channels,
        dt_bias=channels,
        initial_state=states,
        document_state=None if inputs.document_state is None else states,
    )
    return specs, of_block((1, 1, state, block), lambda b, t, e: (b, t, 0, e))


def _own_lanes(sequence_ref: Ref) -> Ref:
    """Where this program's channels are among those of its group."""
    block = sequence_ref.shape[2]
    return pl.ds(pl.multiple_of(pl.program_id(3) * block, block), block)


def _own(refs: _Inputs, lanes: Ref) -> _Inputs:
    """Refs of which some have the channels of a group, with those of this program alone."""

    def at_lanes(ref: Ref | None) -> Ref | None:
        return None if ref is None else ref.at[..., lanes]

    return refs._replace(
        A=at_lanes(refs.A),
        D=at_lanes(refs.D),
        dt_bias=at_lanes(refs.dt_bias),
        initial_state=at_lanes(refs.initial_state),
        document_state=at_lanes(refs.document_state),
    )


def _sizes(inputs: _Inputs) -> tuple[int, int]:
    """Positions times channels, of all rows, and states."""
    state, channels = inputs.A.shape
    return inputs.x.shape[0] * math.prod(_chunks(inputs)) * channels, state


def _sum_flops(inputs: _Inputs) -> int:
    """Of the matmuls that sum terms of all positions once. Those that lay out B and C, 4 % of them
    with 3200 channels, are not counted."""
    entries, state = _sizes(inputs)
    return 2 * POSITIONS * state * entries


def _steps(inputs: _Inputs) -> _Steps:
    state = inputs.A.shape[0]
    tiles = _block(state, inputs.x.shape[2]) // LANES
    _, chunk = _chunks(inputs)

    def scratch(*shape: int) -> Ref:
        return pltpu.VMEM((*shape, LANES), jnp.float32)

    states = scratch(tiles, state)
    return _Steps(
        delta=scratch(tiles, chunk),
        u=scratch(tiles, chunk),
        B=scratch(chunk, state),
        C=scratch(chunk, state),
        starts=None if inputs.starts is None else scratch(chunk),
        document_state=None if inputs.document_state is None else states,
        rates=states,
        terms=terms_shape(tiles, state, matmul_dtype(inputs.x.dtype)),
    )


def _pad(v: Array, rows: int, columns: int) -> Array:
    """Zeros up to multiples of these in the last two axes."""
    *_, height, width = v.shape
    edges = ((0, -height % rows), (0, -width % columns))
    return jnp.pad(v, (*((0, 0) for _ in v.shape[:-2]), *edges))
