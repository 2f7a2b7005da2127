"""The selective scan as Mosaic GPU kernels, for Hopper and later.

A block of 128 threads runs `block` channels over the whole length. The states of a channel are
spread over the lanes of one warp, 2 or 4 in the registers of each, so that the numbers of a step
never leave the registers, and one sequence of a few thousand channels is enough to keep every
scheduler of the GPU busy without computing any exponential twice. Sequences pass through shared
memory in chunks, fetched by asynchronous copies one chunk ahead; blocks of neighbouring channels
form a cluster, for which B and C are fetched once and their gradients written once.

Each chunk is three passes: softplus for all its positions at once, the recurrence, and skip and
gate for all positions at once. The gradient keeps only the states between chunks, recomputes those
between groups of `_GROUP` steps, and then takes the groups in reverse.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from hymba_jax.ops.documents import Documents
from hymba_jax.ops.exp2 import LOG2_E, exp, sigmoid
from hymba_jax.ops.kernel_cost import array_bytes
from hymba_jax.ops.remat import SCAN, named
from hymba_jax.ops.selective_scan.cost import backward_cost, forward_cost
from hymba_jax.ops.selective_scan.softplus import softplus
from hymba_jax.types import Array, Float

_CHUNK = 64
_GROUP = 8  # steps whose rows are loaded, and whose gradients of B and C are summed, together
_CLUSTER = 128  # channels for which B and C are fetched together
_SUMMED = 4  # blocks of a cluster that sum their gradients of B and C, of few states
_COPIED = 256  # entries of an axis that an asynchronous copy takes
_STATES = 16  # the lanes and registers of a channel hold a multiple of these
_WAVE = 132 * 4  # warps that occupy every scheduler of an H100

_f32 = jnp.float32
_COMPILER = plgpu.CompilerParams(
    approx_math=True,  # the exponential unit, which errs by 2**-22
    # A barrier at each store to shared memory would be one a step. Rows of the recurrence are
    # written and read by one warp; the passes of a chunk are separated by `commit_smem`.
    unsafe_no_auto_barriers=True,
    reduction_scratch_bytes=_GROUP * 2048,  # for sums over channels, a group at once
)


class _Inputs(NamedTuple):
    """What the kernels read, padded to whole chunks, blocks and lanes. Also used for their
    gradients."""

    x: Any  # (batch, length, channels), as are dt and z
    dt: Any
    z: Any  # or None
    B: Any  # (batch, length, state), as is C
    C: Any
    starts: Any  # (batch, length), 1 where a document starts, else 0; or None
    A: Any  # (channels, state)
    D: Any  # (channels,), as is dt_bias
    dt_bias: Any
    initial_state: Any  # (batch, channels, state)
    document_state: Any  # the state that documents start from; or None


_OF_CHANNELS = ("x", "dt", "z", "dy")
_OF_STATES = ("B", "C", "starts")  # and so the same for all blocks of a cluster


def selective_scan_pallas_gpu(
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
    """`selective_scan` on NVIDIA GPUs; elsewhere only in Pallas's interpret mode.

    Raises:
      ValueError: compiled for a CPU outside interpret mode.
    """
    batch, length, channels = x.shape
    states = A.shape[0]
    block = _block_size(batch, channels)
    to_length = partial(_pad, axis=1, multiple=_CHUNK)
    to_channels = partial(_pad, axis=-1, multiple=block * _cluster_size(channels, block))
    to_states = partial(_pad, axis=-1, multiple=_STATES)

    def vector(v: Array | None) -> Array:
        return to_channels(jnp.zeros(channels, _f32) if v is None else v.astype(_f32))

    def of_states(v: Array) -> Array:
        return to_states(to_channels(v.astype(_f32)).mT)

    if initial_state is None:
        initial_state = jnp.zeros((batch, states, channels), _f32)
    inputs = _Inputs(
        x=to_channels(to_length(x)),
        # softplus(-inf) = 0, so padding leaves the state unchanged.
        dt=to_channels(to_length(dt, value=-jnp.inf)),
        z=None if z is None else to_channels(to_length(z)),
        B=to_states(to_length(B)),
        C=to_states(to_length(C)),
        starts=None if documents is None else to_length(documents.starts.astype(_f32)),
        A=to_states(to_channels(A.astype(_f32)).T),
        D=vector(D),
        dt_bias=vector(dt_bias),
        initial_state=of_states(initial_state),
        document_state=None if documents is None else of_states(documents.state),
    )
    y, final_state = _scan(inputs, block)
    return y[:, :length, :channels], final_state.mT[:, :states, :channels]


def _block_size(batch: int, channels: int) -> int:
    """Channels of a block: 32 keep the exponentials busiest, 16 make twice as many warps."""
    return 32 if batch * channels // 32 * 4 >= _WAVE else 16


def _cluster_size(channels: int, block: int) -> int:
    """A power of two, among which the rows of a chunk can be divided to be fetched."""
    blocks = min(_CLUSTER // block, -(-channels // block))
    return 1 << (blocks.bit_length() - 1)


def _summed_blocks(states: int) -> int:
    """Blocks whose parts fit into about the shared memory of what they lie over: with 16 states in
    bfloat16, two blocks still fit on an SM."""
    return _SUMMED if states <= 2 * _STATES else _SUMMED // 2


def _steps_of_a_row(states: int) -> int:
    """Steps of a group whose gradients of B and C are one row of what a block publishes."""
    steps = _GROUP
    while steps > 1 and steps * states > _COPIED:
        steps //= 2
    return steps


def _pad(v: Array, axis: int, multiple: int, value: float = 0.0) -> Array:
    """Pads the end of an axis to a multiple; arrays that fit are not copied."""
    pads = [(0, 0)] * v.ndim
    pads[axis] = (0, -v.shape[axis] % multiple)
    return jnp.pad(v, pads, constant_values=value) if pads[axis][1] else v


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _scan(inputs: _Inputs, block: int) -> tuple[Array, Array]:
    y, final_state, _ = _forward(inputs, block, keep_chunk_states=False)
    return y, final_state


def _scan_fwd(
    inputs: _Inputs, block: int
) -> tuple[tuple[Array, Array], tuple[_Inputs, Array | None]]:
    y, final_state, chunk_states = named(SCAN, _forward(inputs, block, keep_chunk_states=True))
    return (y, final_state), (inputs, chunk_states)


def _scan_bwd(
    block: int, residuals: tuple[_Inputs, Array], cotangents: tuple[Array, Array]
) -> tuple[_Inputs]:
    return (_backward(*residuals, *cotangents, block),)


_scan.defvjp(_scan_fwd, _scan_bwd)


class _Layouts:
    """Which thread holds which numbers of an array."""

    def __init__(self, block: int):
        per_warp = block // 4
        lanes = 32 // per_warp  # lanes among which the states of a channel are divided
        each = _STATES // lanes
        state = plgpu.Layout.TILED(
            plgpu.Tiling(((block, _STATES), (per_warp, _STATES), (each,))), (-5,), (-3, -2), -1
        )
        self.state = state  # (channels, state)
        self.channels = state.reduce((1,))
        self.states = state.reduce((0,))
        rows = 32 // (block // 4)
        self.chunk = plgpu.Layout.TILED(  # (steps, channels), four channels in a thread
            plgpu.Tiling(((4 * rows, block), (rows, block), (4,))), (-5,), (-3, -2), -1
        )
        self.chunk_channels = self.chunk.reduce((0,))


class _Tile:
    """The tile that one thread block computes: a row, a block of channels."""

    def __init__(self, block: int, states: int, blocks_in_cluster: int):
        self.block = block
        self.shape = (block, states)
        self.layouts = _Layouts(block)
        self.row = lax.axis_index("batch")
        self.cluster, self.member = lax.axis_index("group"), lax.axis_index("member")
        self.channels = pl.ds((self.cluster * blocks_in_cluster + self.member) * block, block)
        self.among = "member" if blocks_in_cluster > 1 else None  # who share a copy

    def fetch(self, i: Any, gmem: dict[str, Any], smem: dict[str, Any], barrier: Any) -> None:
        """Starts the asynchronous copies of chunk i of every sequence into its slot."""
        steps, slot = pl.ds(i * _CHUNK, _CHUNK), lax.rem(i, 2)
        for name, into in smem.items():
            source, among = gmem[name].at[self.row, steps], self.among
            if name in _OF_CHANNELS:
                source, among = source.at[:, self.channels], None
            plgpu.copy_gmem_to_smem(source, into.at[slot], barrier.at[slot], collective_axes=among)

    def vector(self, ref: Any) -> Array:
        """A number per channel, for all steps of a chunk."""
        # Less than a cache line, but read once.
        v = plgpu.load(ref.at[self.channels], layout=self.layouts.chunk_channels, optimized=False)
        return lax.broadcast_in_dim(v, (_CHUNK, self.block), (1,))

    def chunk(self, ref: Any) -> Array:
        """All steps of a chunk, for pointwise operations."""
        return plgpu.load(ref, layout=self.layouts.chunk).astype(_f32)

    def channel_rows(self, ref: Any, j: Any) -> list[Array]:
        """The numbers of each channel in the steps of group j, the same for all states."""
        return self._rows(ref, j, self.layouts.channels, axis=0)

    def state_rows(self, ref: Any, j: Any) -> list[Array]:
        """The numbers of each state in the steps of group j, the same for all channels."""
        return self._rows(ref, j, self.layouts.states, axis=1)

    def _rows(self, ref: Any, j: Any, layout: Any, axis: int) -> list[Array]:
        rows = plgpu.load(ref.at[pl.ds(j * _GROUP, _GROUP)], layout=layout).astype(_f32)
        return [lax.broadcast_in_dim(rows[k], self.shape, (axis,)) for k in range(_GROUP)]

    def over_channels(self, steps: list[Array]) -> Array:
        """Sums over the channels, one step after the other, with the barriers of a single sum."""
        together = plgpu.layout_cast(lax.concatenate(steps, 1), self.layouts.state)
        return jnp.sum(together, axis=0)

    def states(self, ref: Any) -> Array:
        """The states of each channel."""
        return plgpu.load(ref.at[self.row, self.channels], layout=self.layouts.state)


class _ClusterSum(NamedTuple):
    """Sums what the blocks of a cluster have summed over their own channels, a chunk at a time.

    A block publishes its part in global memory, awaits that copy, and copies it from there into the
    shared memory of all members. Each of them sums a share of the rows, in the members' order.

    What is written to global memory is read only by the block that wrote it, and both copies are of
    the asynchronous proxy: PTX orders these without a fence ("proxy-preserved base causality
    order"). Members learn of the arrival as of B's and C's, by the bytes that a barrier counts.
    """

    tile: _Tile
    part: Any  # of this block, in shared memory
    parts: Any  # of all members, in shared memory
    arrived: Any  # the barrier of `parts`
    published: Any  # of all members, in global memory, in two slots
    total: Any  # in global memory, for all chunks

    def publish(self, i: Any) -> None:
        """Starts the copy of chunk i's part. All members have received what its slot held."""
        plgpu.copy_smem_to_gmem(self.part, self.published.at[lax.rem(i, 2), self.tile.member])

    def fetch(self, i: Any) -> None:
        """Starts the copies of all parts, which every member has published and awaited. They are
        split along the first axis: each member sends the part that it wrote."""
        plgpu.copy_gmem_to_smem(
            self.published.at[lax.rem(i, 2)],
            self.parts,
            self.arrived,
            collective_axes=self.tile.among,
        )

    def write(self, i: Any) -> None:
        """This member's share of the sum."""
        members, rows, _ = self.parts.shape
        share = pl.ds(self.tile.member * (rows // members), rows // members)
        plgpu.barrier_wait(self.arrived)
        self.total[i, share] = sum(self.parts[m, share] for m in range(members))


def _at_start(starts: Any, j: Any, k: int, of_document: Any, otherwise: Array) -> Array:
    """The first of two where a document starts in step k of group j; the second if none do."""
    if starts is None:
        return otherwise
    is_start = jnp.broadcast_to(starts[j * _GROUP + k] > 0, otherwise.shape)
    return jnp.where(is_start, of_document, otherwise)


def _forward(
    inputs: _Inputs, block: int, *, keep_chunk_states: bool
) -> tuple[Array, Array, Array | None]:
    """y, the final state and, if wanted, the states before each chunk (batch, chunks, E, N)."""
    batch, length, channels = inputs.x.shape
    states, chunks = inputs.A.shape[1], length // _CHUNK
    blocks = _cluster_size(channels, block)
    operands = _present(**inputs._asdict())
    outputs = {"y": inputs.x, "final_state": inputs.initial_state}
    if keep_chunk_states:
        outputs["chunk_states"] = jax.ShapeDtypeStruct((batch, chunks, channels, states), _f32)

    def selective_scan_forward(
        *refs: Any, slots: dict[str, Any], rows: Any, y_s: Any, full: Any, free: Any
    ) -> None:
        gmem = dict(zip((*operands, *outputs), refs, strict=True))
        tile = _Tile(block, states, blocks)
        delta_s, u_s, sum_s = (rows.at[k] for k in range(3))
        A = plgpu.load(gmem["A"].at[tile.channels], layout=tile.layouts.state) * LOG2_E
        bias, D = tile.vector(gmem["dt_bias"]), tile.vector(gmem["D"])
        h = tile.states(gmem["initial_state"])
        document = tile.states(gmem["document_state"]) if "starts" in slots else None
        tile.fetch(0, gmem, slots, full)

        def chunk(i: Array, h: Array) -> Array:
            slot = lax.rem(i, 2)
            here = {name: ref.at[slot] for name, ref in slots.items()}
            if keep_chunk_states:
                gmem["chunk_states"][tile.row, i, tile.channels] = h

            @pl.when(i + 1 < chunks)
            def _() -> None:
                _await_members(free)
                tile.fetch(i + 1, gmem, slots, full)

            plgpu.barrier_wait(full.at[slot])
            delta = softplus(tile.chunk(here["dt"]) + bias, exp)
            delta_s[...] = delta
            u_s[...] = delta * tile.chunk(here["x"])
            plgpu.commit_smem()

            def group(j: Array, h: Array) -> Array:
                delta, u = (tile.channel_rows(ref, j) for ref in (delta_s, u_s))
                B, C = (tile.state_rows(here[name], j) for name in ("B", "C"))
                for k in range(_GROUP):
                    h = _at_start(here.get("starts"), j, k, document, h)
                    h = jnp.exp2(delta[k] * A) * h + u[k] * B[k]
                    sum_s[j * _GROUP + k] = jnp.sum(h * C[k], axis=1)
                return h

            h = lax.fori_loop(0, _CHUNK // _GROUP, group, h)
            plgpu.commit_smem()
            y = tile.chunk(sum_s) + D * tile.chunk(here["x"])
            if "z" in here:
                gate = tile.chunk(here["z"])
                y = y * gate * sigmoid(gate)
            y_s[slot] = y.astype(y_s.dtype)
            plgpu.commit_smem()
            steps = pl.ds(i * _CHUNK, _CHUNK)
            plgpu.copy_smem_to_gmem(y_s.at[slot], gmem["y"].at[tile.row, steps, tile.channels])
            plgpu.wait_smem_to_gmem(1, wait_read_only=True)
            return h

        h = lax.fori_loop(0, chunks, chunk, h)
        gmem["final_state"][tile.row, tile.channels] = h
        plgpu.wait_smem_to_gmem(0)

    kernel = plgpu.kernel(
        selective_scan_forward,
        out_type=[jax.ShapeDtypeStruct(v.shape, v.dtype) for v in outputs.values()],
        scratch_types={
            **_fetched(operands, block, blocks),
            "rows": plgpu.SMEM((3, _CHUNK, block), _f32),
            "y_s": plgpu.SMEM((2, _CHUNK, block), inputs.x.dtype),
        },
        cost_estimate=forward_cost(
            inputs.x.size, inputs.A.shape[1], array_bytes(operands, outputs)
        ),
        **_grid(batch, channels, block, blocks),
    )
    y, final_state, *chunk_states = kernel(*operands.values())
    return y, final_state, chunk_states[0] if keep_chunk_states else None


def _backward(inputs: _Inputs, chunk_states: Array, dy: Array, dh: Array, block: int) -> _Inputs:
    """The gradient of each input, given the states before chunks and the cotangents."""
    batch, length, channels = inputs.x.shape
    states, chunks = inputs.A.shape[1], length // _CHUNK
    blocks = min(_summed_blocks(states), _cluster_size(channels, block))
    groups = _CHUNK // _GROUP
    given = {"dy": dy, "chunk_states": chunk_states, "dh": dh}
    operands = _present(**inputs._replace(initial_state=None)._asdict(), **given)
    # What is summed over channels is written as one partial sum per cluster, dB above dC, and what
    # is summed over rows as one per row.
    together = _steps_of_a_row(states)
    pieces = _GROUP // together  # of a group
    clusters = channels // (block * blocks)
    part = (2 * groups * pieces, together * states)
    by_row = jax.ShapeDtypeStruct((batch, channels), _f32)
    gradients = _Inputs(
        x=inputs.x,
        dt=inputs.dt,
        z=inputs.z,
        B=None,
        C=None,
        starts=None,
        A=dh,
        D=by_row,
        dt_bias=by_row,
        initial_state=dh,
        document_state=None if inputs.document_state is None else dh,
    )
    outputs = {"d" + name: v for name, v in _present(**gradients._asdict()).items()}
    outputs["dBC"] = jax.ShapeDtypeStruct((clusters, batch, chunks, *part), _f32)
    # Overwritten every other chunk, so it stays in the L2 cache and costs no HBM bytes.
    published = jax.ShapeDtypeStruct((batch * clusters, 2, blocks, *part), _f32)

    def selective_scan_backward(
        *refs: Any,
        slots: dict[str, Any],
        rows: Any,
        shared: Any,
        full: Any,
        free: Any,
        arrived: Any,
    ) -> None:
        gmem = dict(zip((*operands, *outputs, "published"), refs, strict=True))
        (h_s, part_s), parts_s = shared
        tile = _Tile(block, states, blocks)
        sums = _ClusterSum(
            tile,
            part_s,
            parts_s,
            arrived,
            gmem["published"].at[tile.row * clusters + tile.cluster],
            gmem["dBC"].at[tile.cluster, tile.row],
        )
        # The recurrence replaces the rows of a group by du, the part of ddelta that comes through
        # the decay, and the sum over states of h C.
        u_s, delta_s, dsum_s = (rows.at[k] for k in range(3))
        A = plgpu.load(gmem["A"].at[tile.channels], layout=tile.layouts.state) * LOG2_E
        bias, D = tile.vector(gmem["dt_bias"]), tile.vector(gmem["D"])
        dh = tile.states(gmem["dh"])
        document = tile.states(gmem["document_state"]) if "starts" in slots else None
        tile.fetch(chunks - 1, gmem, slots, full)

        def chunk(step: Array, carry: tuple[Any, ...]) -> tuple[Any, ...]:
            dh, ddocument, dA, dD, dbias = carry
            i = chunks - 1 - step
            slot = lax.rem(i, 2)
            here = {name: ref.at[slot] for name, ref in slots.items()}
            plgpu.wait_smem_to_gmem(0)
            _await_members(free)

            @pl.when(i > 0)
            def _() -> None:
                tile.fetch(i - 1, gmem, slots, full)

            @pl.when(step > 0)
            def _() -> None:
                sums.fetch(i + 1)

            h = plgpu.load(
                gmem["chunk_states"].at[tile.row, i, tile.channels], layout=tile.layouts.state
            )
            plgpu.barrier_wait(full.at[slot])
            delta = softplus(tile.chunk(here["dt"]) + bias, exp)
            delta_s[...] = delta
            u_s[...] = delta * tile.chunk(here["x"])
            dsum = tile.chunk(here["dy"])
            if "z" in here:
                gate = tile.chunk(here["z"])
                dsum = dsum * gate * sigmoid(gate)
            dsum_s[...] = dsum

            @pl.when(step > 0)
            def _() -> None:
                sums.write(i + 1)

            plgpu.commit_smem()

            def recompute(j: Array, h: Array) -> Array:
                h_s[j] = h
                delta, u = (tile.channel_rows(ref, j) for ref in (delta_s, u_s))
                B = tile.state_rows(here["B"], j)
                for k in range(_GROUP):
                    h = _at_start(here.get("starts"), j, k, document, h)
                    h = jnp.exp2(delta[k] * A) * h + u[k] * B[k]
                return h

            h_s[groups - 1] = lax.fori_loop(0, groups - 1, recompute, h)

            def group(back: Array, carry: tuple[Any, ...]) -> tuple[Any, ...]:
                dh, ddocument, dA = carry
                j = groups - 1 - back
                delta, u, dsum = (tile.channel_rows(ref, j) for ref in (delta_s, u_s, dsum_s))
                B, C = (tile.state_rows(here[name], j) for name in ("B", "C"))
                h = plgpu.load(h_s.at[j], layout=tile.layouts.state)
                decay, decayed, dB, dC = [], [], [], []
                for k in range(_GROUP):
                    h = _at_start(here.get("starts"), j, k, document, h)
                    decay.append(jnp.exp2(delta[k] * A))
                    decayed.append(decay[k] * h)
                    h = decayed[k] + u[k] * B[k]
                    dC.append(h * dsum[k])
                    if "z" in here:
                        dsum_s[j * _GROUP + k] = jnp.sum(h * C[k], axis=1)
                for k in reversed(range(_GROUP)):
                    dh = dh + C[k] * dsum[k]
                    u_s[j * _GROUP + k] = jnp.sum(dh * B[k], axis=1)
                    dB.append(dh * u[k])
                    through = dh * decayed[k]
                    delta_s[j * _GROUP + k] = jnp.sum(through * A, axis=1)
                    dA = dA + through * delta[k]
                    dh = dh * decay[k]
                    if ddocument is not None:
                        ddocument = _at_start(here["starts"], j, k, ddocument + dh, ddocument)
                        dh = _at_start(here["starts"], j, k, 0.0, dh)
                for index, steps in ((j, dB[::-1]), (groups + j, dC)):
                    for k in range(pieces):
                        own = steps[k * together : (k + 1) * together]
                        part_s[index * pieces + k] = tile.over_channels(own)
                return dh, ddocument, dA

            dh, ddocument, dA = lax.fori_loop(0, groups, group, (dh, ddocument, dA))
            plgpu.commit_smem()
            sums.publish(i)

            x, v, dy = tile.chunk(here["x"]), tile.chunk(here["dt"]) + bias, tile.chunk(here["dy"])
            du, dsum = tile.chunk(u_s), dy
            if "z" in here:
                gate = tile.chunk(here["z"])
                share = sigmoid(gate)
                silu = gate * share
                dsilu = share * (1.0 + gate - silu)
                here["z"][...] = (dy * (tile.chunk(dsum_s) + D * x) * dsilu).astype(here["z"].dtype)
                dsum = dy * silu
            ddt = (tile.chunk(delta_s) * (1 / LOG2_E) + du * x) * sigmoid(v)
            here["dt"][...] = ddt.astype(here["dt"].dtype)
            here["x"][...] = (du * softplus(v, exp) + D * dsum).astype(here["x"].dtype)
            dD = dD + jnp.sum(dsum * x, axis=0)
            dbias = dbias + jnp.sum(ddt, axis=0)
            plgpu.commit_smem()
            steps = pl.ds(i * _CHUNK, _CHUNK)
            for name in ("x", "dt", "z"):
                if name in here:
                    into = gmem["d" + name].at[tile.row, steps, tile.channels]
                    plgpu.copy_smem_to_gmem(here[name], into)
            return dh, ddocument, dA, dD, dbias

        zero = plgpu.layout_cast(jnp.zeros(tile.shape, _f32), tile.layouts.state)
        zeros = plgpu.layout_cast(jnp.zeros(block, _f32), tile.layouts.chunk_channels)
        carry = (dh, None if document is None else zero, zero, zeros, zeros)
        dh, ddocument, dA, dD, dbias = lax.fori_loop(0, chunks, chunk, carry)
        gmem["dinitial_state"][tile.row, tile.channels] = dh
        if ddocument is not None:
            gmem["ddocument_state"][tile.row, tile.channels] = ddocument
        gmem["dA"][tile.row, tile.channels] = dA
        for name, v in (("dD", dD), ("ddt_bias", dbias)):
            plgpu.store(gmem[name].at[tile.row, tile.channels], v, optimized=False)
        plgpu.wait_smem_to_gmem(0)
        _await_members(free)
        sums.fetch(0)
        sums.write(0)

    kernel = plgpu.kernel(
        selective_scan_backward,
        out_type=[
            *(jax.ShapeDtypeStruct(v.shape, v.dtype) for v in outputs.values()),
            published,
        ],
        scratch_types={
            **_fetched(operands, block, blocks),
            "rows": plgpu.SMEM((3, _CHUNK, block), _f32),
            # Parts arrive after all members have awaited each other, done with the states and their
            # own part, whose accesses `commit_smem` orders before these copies.
            "shared": plgpu.RefUnion(
                [plgpu.SMEM((groups, block, states), _f32), plgpu.SMEM(part, _f32)],
                plgpu.SMEM((blocks, *part), _f32),
            ),
            "arrived": plgpu.Barrier(num_arrivals=1),
        },
        cost_estimate=backward_cost(
            inputs.x.size, inputs.A.shape[1], array_bytes(operands, outputs)
        ),
        **_grid(batch, channels, block, blocks),
    )
    out = dict(zip((*outputs, "published"), kernel(*operands.values()), strict=True))
    dBC = out["dBC"].sum(0).reshape(batch, chunks, 2, _CHUNK, states)
    dB, dC = (dBC[:, :, k].reshape(inputs.B.shape) for k in range(2))
    dA, dD, dbias = (out[name].sum(0) for name in ("dA", "dD", "ddt_bias"))
    return gradients._replace(
        x=out["dx"],
        dt=out["ddt"],
        z=out.get("dz"),
        B=dB.astype(inputs.B.dtype),
        C=dC.astype(inputs.C.dtype),
        A=dA,
        D=dD,
        dt_bias=dbias,
        initial_state=out["dinitial_state"],
        document_state=out.get("ddocument_state"),
    )


def _present(**arrays: Any) -> dict[str, Any]:
    return {name: v for name, v in arrays.items() if v is not None}


def _await_members(free: Any) -> None:
    """Waits until every block of the cluster is done with what is filled next."""
    if free is not None:
        plgpu.barrier_arrive(free)
        plgpu.barrier_wait(free)


def _fetched(operands: dict[str, Array], block: int, blocks: int) -> dict[str, Any]:
    """Double buffers of each sequence, with their barriers."""
    slots = {
        name: plgpu.SMEM((2, _CHUNK, *((block,) if name in _OF_CHANNELS else v.shape[2:])), v.dtype)
        for name, v in operands.items()
        if name in _OF_CHANNELS + _OF_STATES
    }
    return {
        "slots": slots,
        "full": plgpu.Barrier(num_arrivals=len(slots), num_barriers=2),
        "free": plgpu.ClusterBarrier(collective_axes=("member",)) if blocks > 1 else None,
    }


def _grid(batch: int, channels: int, block: int, blocks: int) -> dict[str, Any]:
    return {
        "grid": (batch, channels // (block * blocks)),
        "grid_names": ("batch", "group"),
        "cluster": (blocks,),
        "cluster_names": ("member",),
        "compiler_params": _COMPILER,
    }
