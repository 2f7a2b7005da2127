"""The SSD kernels for GPUs.

A thread block is one warpgroup, whose matrix instructions take 64 rows: `CHUNK` positions, or the
channels of a head.

The forward pass, and the gradient of the states, take the chunks of a head one after the other with
its state in registers, so that they read and write a sequence once, and inference writes no states.
Training keeps the states between chunks, and the gradients of these, in bfloat16, as matmuls take
them. With both, the other gradients are sums within a chunk: over what position i reads (those of C
and of the weights it reads with), and over the positions that j gives to (those of x, B and delta).
As B and C are the same for all heads of a group, a block adds up their gradients over several of
them. No matrix of a chunk's weights leaves the registers.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from hymba_jax.ops.kernel_cost import array_bytes, kernel_cost
from hymba_jax.ops.wgmma import ROWS, iota, multiply_add, shared, spread, zeros
from hymba_jax.types import Array, Float

CHUNK = 64
_SLOTS = 2  # of shared memory for what is fetched
_MOST_HEADS = 8  # over which a block adds up gradients: more would leave too few blocks


class Inputs(NamedTuple):
    """What the kernels read, padded to whole chunks and rows of matmuls. Also used for its
    gradients.

    In a chunk, position i reads j <= i of its document, and the state h before the chunk:

        y_i = read_i C_i h + sum over j of exp(total_i - total_j) delta_j (C_i B_j) x_j + D x_i
        h' = kept h + sum over j of write_j x_j B_j^T

    Positions of a document that starts in the chunk read the state that documents start from in
    place of h, and where it is the chunk's last, h' comes from that.
    """

    x: Any  # (batch, length, heads, channels)
    B: Any  # (batch, length, groups, state), as is C
    C: Any
    D: Any  # (heads,)
    delta: Any  # (batch, heads, length), as are total, read and write
    total: Any  # the sum of delta A in this chunk and document
    read: Any
    write: Any
    kept: Any  # (batch, heads, chunks)
    initial_state: Any  # (batch, heads, channels, state)
    first: Any = None  # (batch, length): of each position's document, the first in its chunk
    read_document: Any = None  # like read, and so on
    kept_document: Any = None
    document_state: Any = None


def forward(inputs: Inputs, *, keep_states: bool) -> tuple[Array, Array, Array | None]:
    """y, the final state and, if wanted, those before each chunk (batch, heads, chunks, ...)."""
    batch, length, heads, channels = inputs.x.shape
    width, chunks = inputs.B.shape[-1], length // CHUNK
    operands = _present(**inputs._asdict())
    outputs = {"y": inputs.x, "final_state": inputs.initial_state}
    if keep_states:
        between = (batch, heads, chunks, channels, width)
        outputs["states"] = jax.ShapeDtypeStruct(between, jnp.bfloat16)

    def ssd_forward(*refs: Any, stream: "_Stream", h_s: Any, staged: Any, document_s: Any) -> None:
        gmem = dict(zip((*operands, *outputs), refs, strict=True))
        place = _place(inputs)
        D = gmem["D"][place.head]
        if document_s is not None:
            document_s[...] = place.state(gmem["document_state"]).astype(jnp.bfloat16)

        def chunk(i: Any, here: dict[str, Any], h: Array) -> Array:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            h_s[...] = h.astype(jnp.bfloat16)
            staged[...] = _weighted(here["x"], here["write"])
            plgpu.commit_smem()
            if keep_states:
                plgpu.copy_smem_to_gmem(h_s, gmem["states"].at[place.row, place.head, i])
            kept = h * gmem["kept"][place.row, place.head, i]
            if document_s is not None:
                kept_document = gmem["kept_document"][place.row, place.head, i]
                kept = lax.cond(
                    kept_document > 0,
                    lambda: kept + kept_document * place.state(gmem["document_state"]),
                    lambda: kept,
                )
            (h,) = multiply_add((kept, staged.transpose((1, 0)), here["B"]))

            C, nothing = here["C"], zeros(CHUNK, channels)
            (scores,) = multiply_add((zeros(CHUNK, CHUNK), C, here["B"].transpose((1, 0))))
            (y,) = multiply_add((nothing, C, h_s.transpose((1, 0))))
            y = y * spread(_numbers(here["read"], 0), y, 0) + D * _load(here["x"])
            if document_s is not None:
                (of_document,) = multiply_add((nothing, C, document_s.transpose((1, 0))))
                read = _numbers(here["read_document"], 0)
                y = y + of_document * spread(read, y, 0)
            weights = scores * _decay(here, scores, 0)
            weights = weights * spread(_numbers(here["delta"], 1), scores, 1)
            (y,) = multiply_add((y, weights.astype(jnp.bfloat16), here["x"]))
            staged[...] = y.astype(jnp.bfloat16)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(staged, place.of("y", gmem["y"], i))
            return h

        h = place.state(gmem["initial_state"])
        h = stream.run(gmem, chunks, lambda i: (place, i), chunk, h)
        _put(h, gmem["final_state"].at[place.row, place.head])
        plgpu.wait_smem_to_gmem(0)

    names = ("x", "B", "C", "delta", "total", "read", "write", "first", "read_document")
    matmuls = CHUNK * (width + channels) + _of_states(inputs, 2, 1)
    kernel = _kernel(
        ssd_forward,
        outputs,
        {"batch": batch, "heads": heads},
        _cost(inputs, matmuls, operands, outputs),
        stream=_Stream.scratch(names, operands),
        h_s=shared(channels, width),
        staged=shared(CHUNK, channels),
        document_s=None if inputs.first is None else shared(channels, width),
    )
    y, final_state, *kept_states = kernel(*operands.values())
    return y, final_state, kept_states[0] if keep_states else None


def backward_states(
    inputs: Inputs,
    states: Float[Array, "batch ssm_heads chunks ssm_head_dim state"],
    dy: Float[Array, "batch length ssm_heads ssm_head_dim"],
    dfinal_state: Float[Array, "batch ssm_heads ssm_head_dim state"],
) -> dict[str, Array]:
    """The gradients of the states and of how much of them is kept.

    Args:
      states: those before each chunk.

    Returns:
      `states`, those after each chunk; `initial_state`, `kept` and, with documents,
      `document_state` and `kept_document`. Of kept, a part per channel.
    """
    batch, length, heads, channels = inputs.x.shape
    width, chunks, has_documents = states.shape[-1], length // CHUNK, inputs.first is not None
    of_channels = jax.ShapeDtypeStruct((batch, heads, chunks, channels), jnp.float32)
    operands = _present(
        C=inputs.C,
        read=inputs.read,
        kept=inputs.kept,
        read_document=inputs.read_document,
        kept_document=inputs.kept_document,
        document_state=inputs.document_state,
        states=states,
        dy=dy,
        dfinal_state=dfinal_state,
    )
    outputs = {"states": states, "initial_state": dfinal_state, "kept": of_channels}
    if has_documents:
        outputs |= {"document_state": dfinal_state, "kept_document": of_channels}

    def ssd_backward_states(*refs: Any, stream: "_Stream", dh_s: Any, staged: Any) -> None:
        gmem, into = _by_name(refs, operands, outputs)
        place = _place(inputs)

        def chunk(step: Any, here: dict[str, Any], carry: tuple[Any, ...]) -> tuple[Any, ...]:
            dh, ddocument = carry
            i = chunks - 1 - step
            at = (place.row, place.head, i)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            dh_s[...] = dh.astype(jnp.bfloat16)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(dh_s, into["states"].at[at])
            _put(jnp.sum(_load(here["states"]) * dh, axis=1), into["kept"].at[at])
            if has_documents:
                document = place.state(gmem["document_state"])
                _put(jnp.sum(document * dh, axis=1), into["kept_document"].at[at])
                ddocument = ddocument + dh * gmem["kept_document"][at]
                ddocument = read_by(here["read_document"], here, ddocument)
            return read_by(here["read"], here, dh * gmem["kept"][at]), ddocument

        def read_by(read: Any, here: dict[str, Any], dstate: Array) -> Array:
            """Adds the gradient of what all positions of a chunk read of a state."""
            staged[...] = _weighted(here["dy"], read)
            plgpu.commit_smem()
            (dstate,) = multiply_add((dstate, staged.transpose((1, 0)), here["C"]))
            return dstate

        carry = (
            place.state(gmem["dfinal_state"]),
            zeros(channels, width) if has_documents else None,
        )
        dh, ddocument = stream.run(
            gmem, chunks, lambda step: (place, chunks - 1 - step), chunk, carry
        )
        _put(dh, into["initial_state"].at[place.row, place.head])
        if has_documents:
            _put(ddocument, into["document_state"].at[place.row, place.head])
        plgpu.wait_smem_to_gmem(0)

    kernel = _kernel(
        ssd_backward_states,
        outputs,
        {"batch": batch, "heads": heads},
        _cost(inputs, _of_states(inputs, 1, 1), operands, outputs, decays=0),
        stream=_Stream.scratch(("C", "dy", "states", "read", "read_document"), operands),
        dh_s=shared(channels, width),
        staged=shared(CHUNK, channels),
    )
    return dict(zip(outputs, kernel(*operands.values()), strict=True))


def backward_read(
    inputs: Inputs,
    states: Float[Array, "batch ssm_heads chunks ssm_head_dim state"],
    dy: Float[Array, "batch length ssm_heads ssm_head_dim"],
) -> dict[str, Array]:
    """The gradients of what positions read with.

    Args:
      states: those before each chunk.

    Returns:
      `C`, a part per block of heads (batch, length, blocks, state); `D`, a part per position and
      head; `read`; `read_document`, with documents; and `total`, that of total_i as the one that
      reads.
    """
    batch, length, heads, channels = inputs.x.shape
    width, together = states.shape[-1], _heads_together(inputs)
    document = inputs.document_state
    operands = _present(
        **inputs._replace(
            D=None,
            write=None,
            kept=None,
            initial_state=None,
            kept_document=None,
            # As matmuls take it.
            document_state=None if document is None else document.astype(jnp.bfloat16),
        )._asdict(),
        states=states,
        dy=dy,
    )
    outputs = {
        "C": jax.ShapeDtypeStruct((batch, length, heads // together, width), jnp.float32),
        "D": inputs.read,
        "read": inputs.read,
        "total": inputs.read,
    } | _present(read_document=inputs.read_document)

    def ssd_backward_read(*refs: Any, stream: "_Stream", group: "_Group") -> None:
        gmem, into = _by_name(refs, operands, outputs)
        place, i = _place(inputs, together), lax.axis_index("chunks")
        group.load(gmem, place, i)
        (scores,) = multiply_add((zeros(CHUNK, CHUNK), group.C, group.B.transpose((1, 0))))

        def head(k: Any, here: dict[str, Any], dC: Array) -> Array:
            at = place.at(k)
            x, dy = here["x"].transpose((1, 0)), here["dy"]
            (dweights,) = multiply_add((zeros(CHUNK, CHUNK), dy, x))
            is_own = iota(dweights, 0) == iota(dweights, 1)
            numbers = {"D": jnp.sum(jnp.where(is_own, dweights, 0.0), axis=1)}
            dscores = dweights * _decay(here, dweights, 0)
            dscores = dscores * spread(_numbers(here["delta"], 1), dscores, 1)
            numbers["total"] = jnp.sum(dscores * scores, axis=1)
            (dC,) = multiply_add((dC, dscores.astype(jnp.bfloat16), group.B))
            dC, numbers["read"] = of_state(here["states"], here["read"], dy, dC)
            if document is not None:
                state, read = here["document_state"], here["read_document"]
                dC, numbers["read_document"] = of_state(state, read, dy, dC)
            for name, values in numbers.items():
                _put(values, at.of(name, into[name], i))
            return dC

        def of_state(state: Any, read: Any, dy: Any, dC: Array) -> tuple[Array, Array]:
            """Adds the gradient of what reads a state; and that of its weight."""
            (y,) = multiply_add((zeros(CHUNK, channels), group.C, state.transpose((1, 0))))
            dread = jnp.sum(_load(dy) * y, axis=1)
            (dC,) = multiply_add((dC, _weighted(dy, read), state))
            return dC, dread

        dC = zeros(CHUNK, width)
        dC = stream.run(gmem, together, lambda k: (place.at(k), i), head, dC)
        _put(dC, place.part(into["C"], i))

    names = ("x", "dy", "states", "delta", "total", "read")
    of_documents = ("first", "read_document", "document_state")
    matmuls = CHUNK * (channels + width + width // together) + _of_states(inputs, 2, 2)
    kernel = _kernel(
        ssd_backward_read,
        outputs,
        {"chunks": length // CHUNK, "batch": batch, "heads": heads // together},
        _cost(inputs, matmuls, operands, outputs),
        stream=_Stream.scratch((*names, *of_documents), operands),
        group=_Group.scratch(width),
    )
    return dict(zip(outputs, kernel(*operands.values()), strict=True))


def backward_given(
    inputs: Inputs,
    dstates: Float[Array, "batch ssm_heads chunks ssm_head_dim state"],
    dy: Float[Array, "batch length ssm_heads ssm_head_dim"],
) -> dict[str, Array]:
    """The gradients of what positions give to others.

    Args:
      dstates: the gradients of the states after each chunk.

    Returns:
      `B`, a part per block of heads (batch, length, blocks, state); `x`, `delta` and `write`.
      The gradient of total_j, as the one that is read, is -delta_j times that of delta_j.
    """
    batch, length, heads, channels = inputs.x.shape
    width, together = dstates.shape[-1], _heads_together(inputs)
    operands = _present(
        x=inputs.x,
        B=inputs.B,
        C=inputs.C,
        D=inputs.D,
        delta=inputs.delta,
        total=inputs.total,
        write=inputs.write,
        first=inputs.first,
        states=dstates,
        dy=dy,
    )
    outputs = {
        "B": jax.ShapeDtypeStruct((batch, length, heads // together, width), jnp.float32),
        "x": inputs.x,
        "delta": inputs.delta,
        "write": inputs.write,
    }

    def ssd_backward_given(*refs: Any, stream: "_Stream", group: "_Group", staged: Any) -> None:
        gmem, into = _by_name(refs, operands, outputs)
        place, i = _place(inputs, together), lax.axis_index("chunks")
        group.load(gmem, place, i)
        (scores,) = multiply_add((zeros(CHUNK, CHUNK), group.B, group.C.transpose((1, 0))))

        def head(k: Any, here: dict[str, Any], dB: Array) -> Array:
            at = place.at(k)
            dh, dy = here["states"], here["dy"]
            (dweights,) = multiply_add((zeros(CHUNK, CHUNK), here["x"], dy.transpose((1, 0))))
            decay = _decay(here, scores, 1)
            ddelta = jnp.sum(dweights * scores * decay, axis=1)
            decay = decay * spread(_numbers(here["delta"], 0), decay, 0)
            (dB,) = multiply_add((dB, (dweights * decay).astype(jnp.bfloat16), group.C))

            (dB,) = multiply_add((dB, _weighted(here["x"], here["write"]), dh))
            (dx,) = multiply_add((zeros(CHUNK, channels), group.B, dh.transpose((1, 0))))
            dwrite = jnp.sum(_load(here["x"]) * dx, axis=1)
            dx = dx * spread(_numbers(here["write"], 0), dx, 0) + gmem["D"][at.head] * _load(dy)
            (dx,) = multiply_add((dx, (scores * decay).astype(jnp.bfloat16), dy))

            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            staged[...] = dx.astype(jnp.bfloat16)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(staged, at.of("x", into["x"], i))
            _put(ddelta, at.of("delta", into["delta"], i))
            _put(dwrite, at.of("write", into["write"], i))
            return dB

        dB = zeros(CHUNK, width)
        dB = stream.run(gmem, together, lambda k: (place.at(k), i), head, dB)
        _put(dB, place.part(into["B"], i))
        plgpu.wait_smem_to_gmem(0)

    names = ("x", "dy", "states", "delta", "total", "write", "first")
    matmuls = CHUNK * (2 * channels + width + width // together) + _of_states(inputs, 2, 0)
    kernel = _kernel(
        ssd_backward_given,
        outputs,
        {"chunks": length // CHUNK, "batch": batch, "heads": heads // together},
        _cost(inputs, matmuls, operands, outputs),
        stream=_Stream.scratch(names, operands),
        group=_Group.scratch(width),
        staged=shared(CHUNK, channels),
    )
    return dict(zip(outputs, kernel(*operands.values()), strict=True))


class _Group(NamedTuple):
    """Shared memory for B and C of a chunk, and the barrier of their arrival."""

    B: Any
    C: Any
    loaded: Any

    @staticmethod
    def scratch(width: int) -> "_Group":
        """What to allocate."""
        of_chunk = shared(CHUNK, width)
        return _Group(of_chunk, of_chunk, plgpu.Barrier(num_arrivals=2))

    def load(self, gmem: dict[str, Any], place: "_Place", i: Any) -> None:
        """Those of chunk i."""
        for name in ("B", "C"):
            source = place.of(name, gmem[name], i)
            plgpu.copy_gmem_to_smem(source, getattr(self, name), self.loaded)
        plgpu.barrier_wait(self.loaded)


class _Place(NamedTuple):
    """A row of the batch and a head, in a kernel."""

    row: Any
    head: Any
    per_group: int

    def at(self, k: Any) -> "_Place":
        """The k-th head after this one."""
        return self._replace(head=self.head + k)

    def of(self, name: str, ref: Any, i: Any) -> Any:
        """What an array in global memory has of chunk i."""
        positions = pl.ds(i * CHUNK, CHUNK)
        match name:
            case "x" | "y" | "dy":
                return ref.at[self.row, positions, self.head]
            case "B" | "C":
                group = lax.div(self.head, jnp.int32(self.per_group))
                return ref.at[self.row, positions, group]
            case "first":
                return ref.at[self.row, positions]
            case "states":
                return ref.at[self.row, self.head, i]
            case "document_state":
                return ref.at[self.row, self.head]
            case _:
                return ref.at[self.row, self.head, positions]

    def part(self, ref: Any, i: Any) -> Any:
        """What a sum over heads has of chunk i and this block."""
        return ref.at[self.row, pl.ds(i * CHUNK, CHUNK), lax.axis_index("heads")]

    def state(self, ref: Any) -> Array:
        """The state of its head."""
        return plgpu.load(ref.at[self.row, self.head], layout=ROWS, optimized=False)


def _place(inputs: Inputs, together: int = 1) -> _Place:
    """That of a block, or of the first of its heads."""
    head = lax.axis_index("heads") * together
    return _Place(lax.axis_index("batch"), head, inputs.x.shape[2] // inputs.B.shape[2])


def _heads_together(inputs: Inputs) -> int:
    """Heads of a group that a block of the last two kernels takes: a divisor of their number."""
    per_group = inputs.x.shape[2] // inputs.B.shape[2]
    return max(n for n in range(1, _MOST_HEADS + 1) if per_group % n == 0)


def _numbers(ref: Any, axis: int) -> Array:
    """One for each row (axis 0) or column of a matmul."""
    return plgpu.load(ref, layout=ROWS.reduce(1 - axis), optimized=False)


def _load(ref: Any) -> Array:
    """An operand of matmuls in shared memory, for arithmetic."""
    return plgpu.load(ref, layout=ROWS).astype(jnp.float32)


def _weighted(ref: Any, weights: Any) -> Array:
    """An operand of matmuls in shared memory, times one number for each row."""
    v = _load(ref)
    return (v * spread(_numbers(weights, 0), v, 0)).astype(jnp.bfloat16)


def _put(result: Array, into: Any) -> None:
    """Writes a result, or a number for each of its rows, to global memory."""
    plgpu.store(into, result, optimized=False)


def _decay(here: dict[str, Any], like: Array, axis: int) -> Array:
    """exp(total_i - total_j), or 0 where i does not read j.

    Args:
      axis: that of i.
    """
    i, j, total = iota(like, axis), iota(like, 1 - axis), here["total"]
    reads = j <= i
    if "first" in here:
        reads = reads & (j >= spread(_numbers(here["first"], axis), like, axis))
    of_i, of_j = (spread(_numbers(total, a), like, a) for a in (axis, 1 - axis))
    return jnp.exp(jnp.where(reads, of_i - of_j, -jnp.inf))


class _Stream(NamedTuple):
    """Slots of shared memory, by the name of what is fetched into them, and their barriers."""

    slots: dict[str, Any]
    full: Any

    @staticmethod
    def scratch(names: Sequence[str], operands: dict[str, Any]) -> "_Stream":
        """What to allocate for a chunk of each of these operands that there is."""
        slots = {}
        for name in names:
            if name in ("states", "document_state") and name in operands:
                slots[name] = shared(_SLOTS, *operands[name].shape[-2:])
            elif name in ("x", "B", "C", "dy"):
                slots[name] = shared(_SLOTS, CHUNK, operands[name].shape[-1])
            elif name in operands:
                slots[name] = plgpu.SMEM((_SLOTS, CHUNK), operands[name].dtype)
        return _Stream(slots, plgpu.Barrier(num_arrivals=len(slots), num_barriers=_SLOTS))

    def run(
        self,
        gmem: dict[str, Any],
        steps: int,
        at: Callable[[Any], tuple[_Place, Any]],
        step: Callable[..., Any],
        carry: Any,
    ) -> Any:
        """`carry = step(i, slots of i, carry)`, while what the next step needs is fetched.

        Args:
          at: the place and the chunk of a step.
        """

        def fetch(i: Any) -> None:
            slot, (place, chunk) = lax.rem(i, jnp.int32(_SLOTS)), at(i)
            for name, into in self.slots.items():
                source = place.of(name, gmem[name], chunk)
                plgpu.copy_gmem_to_smem(source, into.at[slot], self.full.at[slot])

        def one(i: Any, carry: Any) -> Any:
            slot = lax.rem(i, jnp.int32(_SLOTS))

            @pl.when(i + 1 < steps)
            def _() -> None:
                fetch(i + 1)

            plgpu.barrier_wait(self.full.at[slot])
            return step(i, {name: ref.at[slot] for name, ref in self.slots.items()}, carry)

        fetch(jnp.int32(0))
        return lax.fori_loop(0, steps, one, carry)


def _kernel(
    body: Any,
    outputs: dict[str, Any],
    grid: dict[str, int],
    cost: pl.CostEstimate,
    **scratch: Any,
) -> Callable[..., Any]:
    """A kernel of one warpgroup in each block of the grid."""
    return plgpu.kernel(
        body,
        out_type=[jax.ShapeDtypeStruct(v.shape, v.dtype) for v in outputs.values()],
        scratch_types=scratch,
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        cost_estimate=cost,
        compiler_params=plgpu.CompilerParams(
            approx_math=True,  # the exponential unit, which errs by 2**-22
            # With the layouts stated here: a search for them takes minutes, and found none.
            lowering_semantics=plgpu.LoweringSemantics.Lane,
        ),
    )


def _cost(inputs: Inputs, products: int, *arrays: Any, decays: int = 1) -> pl.CostEstimate:
    """Of a kernel with so many products of matmuls for each position and head.

    What blocks fetch again is taken to be in the L2 cache, which is larger than a row's B and C.
    """
    positions = inputs.delta.size
    return kernel_cost(2 * products * positions, decays * CHUNK * positions, array_bytes(arrays))


def _of_states(inputs: Inputs, usual: int, of_document: int) -> int:
    """Products for a position of so many matmuls with a state, and with that of documents."""
    matmuls = usual if inputs.first is None else usual + of_document
    return matmuls * inputs.x.shape[-1] * inputs.B.shape[-1]


def _by_name(
    refs: Sequence[Any], operands: dict[str, Any], outputs: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """A kernel's refs of its operands, and those of its outputs."""
    count = len(operands)
    into = dict(zip(outputs, refs[count:], strict=True))
    return dict(zip(operands, refs[:count], strict=True)), into


def _present(**arrays: Any) -> dict[str, Any]:
    return {name: v for name, v in arrays.items() if v is not None}
