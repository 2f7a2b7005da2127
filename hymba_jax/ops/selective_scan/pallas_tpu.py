"""The selective scan as Pallas kernels for TPUs: every sequence is read once and written once.

The grid runs over rows, groups of blocks of channels and, sequentially, chunks of time and, in
each, the blocks of a group, whose states stay in VMEM between chunks. As in HBM, channels lie along
lanes; states lie along sublanes. The scan is bound by arithmetic slots: `_put_columns` and
`_prepare` store operands in VMEM so that loads broadcast them over tiles, and `_fold` makes sums
over states cheap. What goes across lanes is done once for all blocks of a group, as it would delay
the arithmetic. The positions of an iteration are scheduled together; tile after tile, few registers
spill.

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
from hymba_jax.ops.kernel_cost import block_bytes
from hymba_jax.ops.remat import SCAN, named
from hymba_jax.ops.selective_scan.cost import backward_cost, forward_cost
from hymba_jax.ops.selective_scan.softplus import softplus
from hymba_jax.types import Array, Float

# Positions per chunk: one for each lane of the transposed B and C.
_CHUNK = 128
# A tile is 8 sublanes by 128 lanes. An iteration of a loop takes 8 positions.
_SUBLANES, _LANES = 8, 128
# Channels and states per block: a wider one has more tiles for the latencies of each, until the
# states take too many registers, and those of a chunk too much VMEM.
_MAX_BLOCK, _MAX_STATES = 640, 640 * 16
# Blocks per group. VMEM holds the states of all.
_MAX_GROUP = 8
_ITERATIONS = _CHUNK // _SUBLANES
# Iterations, and positions of the recurrence, scheduled together: the latencies of one are the time
# of the others.
_UNROLL_ITERATIONS, _UNROLL_POSITIONS = 2, _SUBLANES
# 16 states take about the 16 MiB of VMEM that a kernel has unasked, 128 take 47 MiB.
_PARAMS = pltpu.CompilerParams(
    dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"),
    vmem_limit_bytes=48 * 2**20,
)

# A VMEM ref, a shape or a BlockSpec of an array, depending on the stage.
Ref = Any


class _Inputs(NamedTuple):
    """What the kernels read. All but x, dt and z are padded to whole tiles, chunks and blocks."""

    x: Ref  # (batch, length, channels), as are dt and z
    dt: Ref
    z: Ref  # or None
    B: Ref  # (batch, state, length), as is C
    C: Ref
    starts: Ref  # (batch, 8, length), 1 where a document starts, else 0; or None
    A: Ref  # (state, channels)
    D: Ref  # (1, channels), as is dt_bias
    dt_bias: Ref
    initial_state: Ref  # (batch, state, channels)
    document_state: Ref  # the state that documents start from; or None


class _Steps(NamedTuple):
    """Operands of the recurrence in VMEM, laid out for broadcasting loads."""

    delta: Ref  # (tiles, positions, lanes), as is u
    u: Ref
    B: Ref  # (positions, tiles, sublanes, lanes), as are C and starts
    C: Ref
    starts: Ref  # or None
    document_state: Ref  # or None
    # A is in base 2, which saves one multiplication per exponential. What a kernel has written is
    # loaded in each step; an input would occupy registers throughout.
    rates: Ref


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
    batch, _, channels = x.shape
    state, block = A.shape[0], _block(A.shape[0], channels)

    def of_positions(v: Array) -> Array:
        return _pad(v.astype(jnp.float32).swapaxes(1, 2), _SUBLANES, _CHUNK)

    def of_channels(v: Array | None) -> Array:
        v = jnp.zeros(channels) if v is None else v
        return _pad(v.astype(jnp.float32)[None], 1, block)

    def of_states(v: Array) -> Array:
        return _pad(v.astype(jnp.float32), _SUBLANES, block)

    if initial_state is None:
        initial_state = jnp.zeros((batch, state, channels))
    starts = document_state = None
    if documents is not None:
        starts = of_positions(jnp.repeat(documents.starts[..., None], _SUBLANES, axis=2))
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
    return y, final_state[:, :state, :channels]


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
        scratch_shapes=[_steps(inputs), _terms(inputs)],
        compiler_params=_PARAMS,
        cost_estimate=forward_cost(*_sizes(inputs), moved),
        name="selective_scan_forward",
    )(inputs)


def _forward_kernel(inputs: _Inputs, *refs: Ref, edge: tuple[int, int] | None) -> None:
    # A block that is the same in every chunk stays in VMEM until the last: `h_ref` carries.
    y_ref, h_ref, *borders_refs, steps, terms_ref = refs
    lanes = _own_lanes(y_ref)
    inputs, h_ref = _own(inputs, lanes), h_ref.at[:, :, lanes]
    chunk = pl.program_id(2)
    valid_rows = _valid_rows(edge, chunk, y_ref.shape[2])

    @pl.when(chunk == 0)
    def _() -> None:
        h_ref[0] = inputs.initial_state[0]

    for borders_ref in borders_refs:
        borders_ref[0, 0] = h_ref[0]

    @pl.when(pl.program_id(3) == 0)
    def _() -> None:
        _put_columns(inputs, steps)

    _prepare(inputs, steps, valid_rows)

    def iteration(i: Array, h: list[Array]) -> list[Array]:
        def advance(t: Array, h: list[Array]) -> list[Array]:
            at = i * _SUBLANES + t
            C = steps.C[at]
            for tile in range(len(h)):
                h[tile] = _advance(steps, tile, at, h[tile])
                _fold(terms_ref, tile, t, h[tile] * C)
            return h

        h = jax.lax.fori_loop(0, _SUBLANES, advance, h, unroll=_UNROLL_POSITIONS)
        rows, valid = _rows(i), valid_rows(i)
        y = _unfold(terms_ref) + inputs.D[...] * _read(inputs.x, rows, valid)
        if inputs.z is not None:
            y = y * jax.nn.silu(_read(inputs.z, rows, valid))
        y_ref[0, rows] = y.astype(y_ref.dtype)
        return h

    h = _tiles(h_ref[0])
    h = jax.lax.fori_loop(0, _ITERATIONS, iteration, h, unroll=_UNROLL_ITERATIONS)
    h_ref[0] = _flat(h)


def _backward(inputs: _Inputs, chunk_states: Array, dy: Array, dh: Array) -> _Inputs:
    """The gradient of each input, given the states before chunks and the cotangents."""
    batch, groups, chunks, _ = grid = _grid(inputs)
    specs, chunk_state_spec = _specs(inputs, lambda step: chunks - 1 - step)
    state = inputs.A.shape[0]
    # What several programs read gets a gradient from each of them, to be summed.
    positions_spec = pl.BlockSpec(
        (1, 1, state, _CHUNK), lambda b, g, t, e: (b, g, 0, chunks - 1 - t)
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
    (gradients,) = pl.pallas_call(
        partial(_backward_kernel, edge=_edge(inputs)),
        grid=grid,
        in_specs=in_specs,
        out_specs=[out_specs],
        out_shape=[shapes],
        scratch_shapes=[
            steps,
            pltpu.VMEM((_CHUNK + 1, *steps.rates.shape), jnp.float32),
            steps.u,
            steps.B,
            steps.C,
            _terms(inputs),
            _terms(inputs),
        ],
        compiler_params=_PARAMS,
        cost_estimate=backward_cost(
            *_sizes(inputs), block_bytes(grid, [in_specs, out_specs], [operands, shapes])
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
    dB_ref: Ref,
    dC_ref: Ref,
    du_terms_ref: Ref,
    ddelta_terms_ref: Ref,
    *,
    edge: tuple[int, int] | None,
) -> None:
    lanes = _own_lanes(dy_ref)
    inputs, gradients = _own(inputs, lanes), _own(gradients, lanes)
    final_dh_ref = final_dh_ref.at[:, :, lanes]
    step = pl.program_id(2)
    valid_rows = _valid_rows(edge, pl.num_programs(2) - 1 - step, dy_ref.shape[2])

    @pl.when(step == 0)
    def _() -> None:
        gradients.initial_state[0] = final_dh_ref[0]
        for sums in (gradients.A, gradients.D, gradients.dt_bias, gradients.document_state):
            if sums is not None:
                sums[...] = jnp.zeros(sums.shape, sums.dtype)

    @pl.when(pl.program_id(3) == 0)
    def _() -> None:
        _put_columns(inputs, steps, dB_ref, dC_ref)

    _prepare(inputs, steps, valid_rows)

    def recompute(i: Array, _: None) -> None:
        rows, valid = _rows(i), valid_rows(i)
        dy = _read(dy_ref, rows, valid)
        if inputs.z is not None:
            z = _read(inputs.z, rows, valid)
            gate = jax.nn.sigmoid(z)
            dgate = dy * gate * (1 + z * (1 - gate))
            dy = dy * z * gate
        _put_rows(dy_ungated_ref, rows, dy)

        def advance(t: Array, h: list[Array]) -> list[Array]:
            at = i * _SUBLANES + t
            C, dC = steps.C[at], dC_ref[at]
            for tile in range(len(h)):
                h[tile] = _advance(steps, tile, at, h[tile])
                states_ref[at + 1, tile] = h[tile]
                dC += h[tile] * _row(dy_ungated_ref, tile, at)
                if inputs.z is not None:
                    _fold(du_terms_ref, tile, t, h[tile] * C)
            dC_ref[at] = dC
            return h

        h = list(states_ref[i * _SUBLANES])
        jax.lax.fori_loop(0, _SUBLANES, advance, h, unroll=_UNROLL_POSITIONS)
        if inputs.z is not None:
            y = _unfold(du_terms_ref) + inputs.D[...] * _read(inputs.x, rows, valid)
            gradients.z[0, rows] = (dgate * y).astype(gradients.z.dtype)

    _put_tiles(states_ref.at[0], border_ref[0, 0])
    jax.lax.fori_loop(0, _ITERATIONS, recompute, None, unroll=_UNROLL_ITERATIONS)

    def walk_back(iteration: Array, _: None) -> None:
        i = _ITERATIONS - 1 - iteration
        rows, valid = _rows(i), valid_rows(i)

        def retreat(
            step: Array, carry: tuple[list[Array], list[Array]]
        ) -> tuple[list[Array], list[Array]]:
            t = _SUBLANES - 1 - step
            at = i * _SUBLANES + t
            dh, dA = carry
            B, C, dB = steps.B[at], steps.C[at], dB_ref[at]
            for tile, A in enumerate(_tiles(inputs.A[...])):
                delta = _row(steps.delta, tile, at)
                dh[tile] += C * _row(dy_ungated_ref, tile, at)
                dB += dh[tile] * _row(steps.u, tile, at)
                _fold(du_terms_ref, tile, t, dh[tile] * B)
                dh[tile] *= jnp.exp2(delta * steps.rates[tile])
                dexponent = dh[tile] * _before(steps, tile, at, states_ref[at, tile])
                _fold(ddelta_terms_ref, tile, t, dexponent * A)
                dA[tile] += dexponent * delta
            dB_ref[at] = dB
            if steps.starts is not None:
                start = steps.starts[at] > 0
                gradients.document_state[0] += _flat([jnp.where(start, v, 0) for v in dh])
                dh = [jnp.where(start, 0, v) for v in dh]
            return dh, dA

        carry = _tiles(gradients.initial_state[0]), _tiles(gradients.A[0])
        dh, dA = jax.lax.fori_loop(0, _SUBLANES, retreat, carry, unroll=_UNROLL_POSITIONS)
        gradients.initial_state[0] = _flat(dh)
        gradients.A[0] = _flat(dA)
        x, dt = _read(inputs.x, rows, valid), _dt(inputs, rows, valid)
        dy, delta = _rows_of(dy_ungated_ref, rows), _rows_of(steps.delta, rows)
        du = _unfold(du_terms_ref)
        dx = du * delta + inputs.D[...] * dy
        ddt = (_unfold(ddelta_terms_ref) + du * x) * jax.nn.sigmoid(dt)
        gradients.x[0, rows] = dx.astype(gradients.x.dtype)
        gradients.dt[0, rows] = ddt.astype(gradients.dt.dtype)
        gradients.D[0] += dy * x
        gradients.dt_bias[0] += ddt

    jax.lax.fori_loop(0, _ITERATIONS, walk_back, None, unroll=_UNROLL_ITERATIONS)

    @pl.when(pl.program_id(3) == pl.num_programs(3) - 1)
    def _() -> None:
        gradients.B[0, 0], gradients.C[0, 0] = _sum_lanes(dB_ref, dC_ref)


def _prepare(inputs: _Inputs, steps: _Steps, valid_rows: Callable[[Array], Array | None]) -> None:
    """Lays out the other operands, those of a block."""
    _put_tiles(steps.rates, inputs.A[...] * math.log2(math.e))
    if inputs.starts is not None:
        _put_tiles(steps.document_state, inputs.document_state[0])

    def iteration(i: Array, _: None) -> None:
        rows, valid = _rows(i), valid_rows(i)
        delta = softplus(_dt(inputs, rows, valid), jnp.exp)
        _put_rows(steps.delta, rows, delta)
        _put_rows(steps.u, rows, delta * _read(inputs.x, rows, valid))

    jax.lax.fori_loop(0, _ITERATIONS, iteration, None, unroll=_UNROLL_ITERATIONS)


def _put_columns(inputs: _Inputs, steps: _Steps, *sums_refs: Ref) -> None:
    """Lays out a chunk's columns for all blocks of a group, and clears what they add up."""
    pairs = ((inputs.B, steps.B), (inputs.C, steps.C), (inputs.starts, steps.starts))
    sources, columns = zip(*(pair for pair in pairs if pair[0] is not None), strict=True)

    def iteration(i: Array, sources: list[Array]) -> list[Array]:
        """Takes the first columns and rolls on to the next."""
        for ref, source in zip(columns, sources, strict=True):
            for t in range(_SUBLANES):
                column = jnp.broadcast_to(source[:, t : t + 1], source.shape)
                ref[i * _SUBLANES + t] = column.reshape(ref.shape[1:])
        for ref in sums_refs:
            for t in range(_SUBLANES):
                ref[i * _SUBLANES + t] = jnp.zeros(ref.shape[1:])
        return [pltpu.roll(source, _CHUNK - _SUBLANES, 1) for source in sources]

    jax.lax.fori_loop(
        0, _ITERATIONS, iteration, [ref[0] for ref in sources], unroll=_UNROLL_ITERATIONS
    )


def _dt(inputs: _Inputs, rows: Ref, valid: Array | None) -> Array:
    # softplus(-inf) = 0, so what lies past the end leaves the state unchanged.
    return _read(inputs.dt, rows, valid, -jnp.inf) + inputs.dt_bias[...]


def _before(steps: _Steps, tile: int, at: Array, h: Array) -> Array:
    """The state before a position, given that after the position before."""
    if steps.starts is None:
        return h
    return jnp.where(steps.starts[at] > 0, steps.document_state[tile], h)


def _advance(steps: _Steps, tile: int, at: Array, h: Array) -> Array:
    """The state after a position, given that after the position before."""
    decay = jnp.exp2(_row(steps.delta, tile, at) * steps.rates[tile])
    return decay * _before(steps, tile, at, h) + _row(steps.u, tile, at) * steps.B[at]


def _rows(i: Array) -> Ref:
    return pl.ds(pl.multiple_of(i * _SUBLANES, _SUBLANES), _SUBLANES)


def _row(ref: Ref, tile: int, at: Array) -> Array:
    """A position's row, broadcast over states, which loads do at no cost."""
    return ref[tile, pl.ds(at, 1)][None]


def _put_rows(ref: Ref, rows: Ref, v: Array) -> None:
    ref[:, rows] = jnp.stack(jnp.split(v, ref.shape[0], axis=1))


def _rows_of(ref: Ref, rows: Ref) -> Array:
    return jnp.concatenate(list(ref[:, rows]), axis=1)


def _tiles(v: Array) -> list[Array]:
    """(state, channels) as tiles of channels, (tiles of states, sublanes, lanes) each."""
    tiles = jnp.split(v, v.shape[1] // _LANES, axis=1)
    return [tile.reshape(-1, _SUBLANES, _LANES) for tile in tiles]


def _put_tiles(ref: Ref, v: Array) -> None:
    ref[...] = jnp.stack(_tiles(v))


def _flat(tiles: list[Array]) -> Array:
    """The inverse of `_tiles`."""
    return jnp.concatenate([tile.reshape(-1, _LANES) for tile in tiles], axis=1)


def _sum_lanes(*refs: Ref) -> list[Array]:
    """Columns that were added up but for their lanes, as (state, positions)."""
    lanes = jax.lax.broadcasted_iota(jnp.int32, (1, _CHUNK), 1)

    def iteration(i: Array, sums: list[Array]) -> list[Array]:
        for at in (i * _SUBLANES + t for t in range(_SUBLANES)):
            columns = [ref[at].reshape(-1, _LANES).sum(1, keepdims=True) for ref in refs]
            sums = [jnp.where(lanes == at, *pair) for pair in zip(columns, sums, strict=True)]
        return sums

    sums = [jnp.zeros((ref.shape[1] * _SUBLANES, _CHUNK)) for ref in refs]
    return jax.lax.fori_loop(0, _ITERATIONS, iteration, sums, unroll=_UNROLL_ITERATIONS)


def _fold(terms_ref: Ref, tile: int, t: Array, terms: Array) -> None:
    """Stores a position's terms of a sum over states, tiles of states added up, as one sublane of
    8 tiles. Adding the sublanes of one tile would take a rotation for each halving."""
    terms_ref[tile : tile + 1, pl.ds(t, _SUBLANES, stride=_SUBLANES)] = terms.sum(0)[None]


def _unfold(terms_ref: Ref) -> Array:
    """The sums over states of an iteration's positions, one per row."""
    starts = range(0, terms_ref.shape[1], _SUBLANES)
    return jnp.concatenate(list(sum(terms_ref[:, n : n + _SUBLANES] for n in starts)), axis=1)


def _read(ref: Ref, rows: Ref, valid: Array | None, otherwise: float = 0.0) -> Array:
    v = ref[0, rows].astype(jnp.float32)
    return v if valid is None else jnp.where(valid, v, otherwise)


def _valid_rows(
    edge: tuple[int, int] | None, chunk: Array, block: int
) -> Callable[[Array], Array | None]:
    """From an iteration, which of its positions and channels exist; None if all do."""
    if edge is None:
        return lambda i: None
    shape = (_SUBLANES, block)
    position = chunk * _CHUNK + jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    first = pl.program_id(1) * pl.num_programs(3) + pl.program_id(3)
    channel = first * block + jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    return lambda i: (position + i * _SUBLANES < edge[0]) & (channel < edge[1])


def _edge(inputs: _Inputs) -> tuple[int, int] | None:
    """Length and channels, where chunks or blocks go past them."""
    _, length, channels = inputs.x.shape
    whole = (inputs.B.shape[2], inputs.A.shape[1])
    return None if (length, channels) == whole else (length, channels)


def _block(state: int, channels: int) -> int:
    """Channels per block: whole tiles, and as many in each block."""
    state = pl.cdiv(state, _SUBLANES) * _SUBLANES
    most = max(min(_MAX_BLOCK, _MAX_STATES // state), _LANES)
    blocks = pl.cdiv(channels, most)
    return pl.cdiv(pl.cdiv(channels, blocks), _LANES) * _LANES


def _grid(inputs: _Inputs) -> tuple[int, int, int, int]:
    """Rows, groups of blocks of channels, chunks of time, blocks of a group."""
    state, channels = inputs.A.shape
    blocks = channels // _block(state, inputs.x.shape[2])
    group = max(n for n in range(1, _MAX_GROUP + 1) if blocks % n == 0)
    return inputs.x.shape[0], blocks // group, inputs.B.shape[2] // _CHUNK, group


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

    sequence = of_block((1, _CHUNK, block), lambda b, t, e: (b, t, e))
    columns = of_block((1, state, _CHUNK), lambda b, t, e: (b, 0, t))
    starts = of_block((1, _SUBLANES, _CHUNK), lambda b, t, e: (b, 0, t))
    states = of_group(1, state)
    channels = of_group(1)
    specs = _Inputs(
        x=sequence,
        dt=sequence,
        z=None if inputs.z is None else sequence,
        B=columns,
        C=columns,
        starts=None if inputs.starts is None else starts,
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
    state, length = inputs.B.shape[1:]
    return inputs.x.shape[0] * length * inputs.A.shape[1], state


def _steps(inputs: _Inputs) -> _Steps:
    state = inputs.A.shape[0]
    tiles = _block(state, inputs.x.shape[2]) // _LANES

    def scratch(*shape: int) -> Ref:
        return pltpu.VMEM((*shape, _LANES), jnp.float32)

    def columns(states: int) -> Ref:
        return scratch(_CHUNK, states // _SUBLANES, _SUBLANES)

    states = scratch(tiles, state // _SUBLANES, _SUBLANES)
    return _Steps(
        delta=scratch(tiles, _CHUNK),
        u=scratch(tiles, _CHUNK),
        B=columns(state),
        C=columns(state),
        starts=None if inputs.starts is None else columns(_SUBLANES),
        document_state=None if inputs.document_state is None else states,
        rates=states,
    )


def _terms(inputs: _Inputs) -> Ref:
    """Scratch of `_fold`, for an iteration. Strided stores need 128 lanes."""
    tiles = _block(inputs.A.shape[0], inputs.x.shape[2]) // _LANES
    return pltpu.VMEM((tiles, _SUBLANES**2, _LANES), jnp.float32)


def _pad(v: Array, rows: int, columns: int) -> Array:
    """Zeros up to multiples of these in the last two axes."""
    *_, height, width = v.shape
    edges = ((0, -height % rows), (0, -width % columns))
    return jnp.pad(v, (*((0, 0) for _ in v.shape[:-2]), *edges))
