"""silu of the causal convolution on GPUs: Pallas kernels in Triton for values and gradients.

XLA writes the sum and its silu in separate passes, and shifts arrays in further ones. A program
here takes one position after another of a segment, for some channels, and has the last inputs in
registers, so that each array is read once. The gradient computes the sum again, and holds the
incomplete gradients of the last inputs likewise. Gradients of what all positions share are summed
over the positions of a program, and then over programs: always in the same order.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from hymba_jax.ops.exp2 import sigmoid
from hymba_jax.ops.kernel_cost import array_bytes, kernel_cost
from hymba_jax.ops.remat import ACTIVATION, named
from hymba_jax.types import Array, Float, Int

_BLOCK = 128  # channels of a program, two to a thread
_GROUP = 8  # positions whose inputs are fetched together
# At least, 8 and 4 for each of a GPU's about 132 processors. Unless segments are the longest, less
# than twice as many, which run at once; those of a gradient fetch twice as much, and write sums.
_FORWARD_PROGRAMS, _BACKWARD_PROGRAMS = 1056, 528
MIN_SEGMENT, MAX_SEGMENT = 64, 512  # positions of a program
_MAX_TAPS = 8  # whose inputs, weights and gradients are in registers

type _Vectors = tuple[Float[Array, "channels"], ...]

_f32 = jnp.float32
_COMPILER = triton.CompilerParams(num_warps=2)


class _Inputs(NamedTuple):
    """What the kernels read; also used for its gradients."""

    x: Any  # (batch, length, channels)
    weight: Any  # (taps, channels)
    bias: Any  # (channels,)
    initial_inputs: Any  # (batch, taps - 1, channels)
    seen: Any  # (batch, length), positions of the own document before each; or None
    lengths: Any  # (batch,), valid positions of each row; or None


def supports(x: Array, weight: Array) -> bool:
    """Whether the kernels take these arrays. A single position is left to XLA."""
    return (
        x.dtype in (jnp.float32, jnp.bfloat16, jnp.float16)
        and x.shape[1] > 1
        and 2 <= weight.shape[0] <= _MAX_TAPS
    )


def causal_conv_pallas_gpu(
    x: Float[Array, "batch length channels"],
    weight: Float[Array, "kernel channels"],
    bias: Float[Array, "channels"],
    initial_inputs: Float[Array, "batch kernel-1 channels"],
    seen: Int[Array, "batch length"] | None = None,
    lengths: Int[Array, "batch"] | None = None,
) -> Float[Array, "batch length channels"]:
    """y of `causal_conv`.

    Args:
      seen: positions of its own document before each, where rows contain several.
    """
    return _convolved(_Inputs(x, weight, bias, initial_inputs, seen, lengths))


@jax.custom_vjp
def _convolved(inputs: _Inputs) -> Array:
    return _forward(inputs)


def _convolved_fwd(inputs: _Inputs) -> tuple[Array, _Inputs]:
    return named(ACTIVATION, _forward(inputs)), inputs


def _convolved_bwd(inputs: _Inputs, dy: Array) -> tuple[_Inputs]:
    return (_backward(inputs, dy),)


_convolved.defvjp(_convolved_fwd, _convolved_bwd)


class _Program:
    """Some channels of a segment of positions. Of each position, it has a vector of channels."""

    def __init__(self, refs: Any, segment: int):
        _, self.length, channels = refs.x.shape
        self.refs, self.before = refs, refs.initial_inputs.shape[1]
        self.channel = pl.program_id(0) * _BLOCK + jnp.arange(_BLOCK)
        self.exists = self.channel < channels
        self.segment, self.row = pl.program_id(1), pl.program_id(2)
        self.start = self.segment * segment
        self.groups = pl.cdiv(jnp.minimum(self.length - self.start, segment), _GROUP)
        self.end = self.length if refs.lengths is None else triton.load(refs.lengths.at[self.row])
        self.weight = [self.vector(refs.weight, tap) for tap in range(self.before + 1)]
        self.bias = self.vector(refs.bias)
        self.initial = [self.vector(refs.initial_inputs, self.row, i) for i in range(self.before)]

    def at(self, *index: Any) -> tuple[Array, ...]:
        return *(jnp.full_like(self.channel, i) for i in index), self.channel

    def vector(self, ref: Any, *index: Any, where: Any = True) -> Array:
        """Zeros unless the condition holds."""
        vector = triton.load(ref.at[self.at(*index)], mask=self.exists & where, other=0.0)
        return vector.astype(_f32)

    def input_at(self, ref: Any, position: Any) -> Array:
        """Zeros where the position is not valid."""
        return self.vector(ref, self.row, position, where=position < self.end)

    def store(self, ref: Any, position: Any, value: Array, where: Any = True) -> None:
        mask = self.exists & (position < self.length) & where
        triton.store(ref.at[self.at(self.row, position)], value.astype(ref.dtype), mask=mask)

    def seen(self, position: Any) -> Any:
        """Positions of its own document before it; of one after the row's end, any number."""
        if self.refs.seen is None:
            return position
        return triton.load(self.refs.seen.at[self.row, jnp.minimum(position, self.length - 1)])

    def inputs_of(self, x: Array, older: _Vectors, seen: Any) -> _Vectors:
        """What the taps are applied to at a position: where its document starts, the initial
        inputs replace those of the document before."""
        own = (jnp.where(seen == 0, a, b) for a, b in zip(self.initial, older, strict=True))
        return *own, x

    def inputs_before(self) -> _Vectors:
        """The last inputs before the segment; before the row, any, as a document starts there."""
        older: _Vectors = tuple(self.initial)
        for distance in range(self.before, 0, -1):
            position = jnp.maximum(self.start - distance, 0)
            x = self.input_at(self.refs.x, position)
            older = self.inputs_of(x, older, self.seen(position))[1:]
        return older

    def convolve(self, inputs: _Vectors) -> Array:
        """The argument of silu, rounded like the result."""
        total = self.bias
        for weight, x in zip(self.weight, inputs, strict=True):
            total = total + weight * x
        return total.astype(self.refs.x.dtype).astype(_f32)


def _forward(inputs: _Inputs) -> Array:
    segment, grid = _grid(inputs, _FORWARD_PROGRAMS)

    def causal_conv_forward(refs: Any, y_ref: Any) -> None:
        program = _Program(refs, segment)

        def group(i: Array, older: _Vectors) -> _Vectors:
            positions = [program.start + i * _GROUP + j for j in range(_GROUP)]
            # Fetched together, before the first is waited for.
            xs = [program.input_at(refs.x, position) for position in positions]
            for position, x in zip(positions, xs, strict=True):
                taken = program.inputs_of(x, older, program.seen(position))
                v = program.convolve(taken)
                y = jnp.where(position < program.end, v * sigmoid(v), 0.0)
                program.store(y_ref, position, y)
                older = taken[1:]
            return older

        lax.fori_loop(0, program.groups, group, program.inputs_before())

    return pl.pallas_call(
        causal_conv_forward,
        grid=grid,
        out_shape=jax.ShapeDtypeStruct(inputs.x.shape, inputs.x.dtype),
        compiler_params=_COMPILER,
        cost_estimate=kernel_cost(
            flops=0, exponentials=inputs.x.size, hbm_bytes=array_bytes(inputs, inputs.x)
        ),
        name="causal_conv_forward",
    )(inputs)


def _backward(inputs: _Inputs, dy: Array) -> _Inputs:
    """The gradient of each input."""
    segment, grid = _grid(inputs, _BACKWARD_PROGRAMS)
    batch, _, channels = inputs.x.shape
    taps = inputs.weight.shape[0]
    before = taps - 1

    def causal_conv_backward(refs: Any, dy_ref: Any, dx_ref: Any, sums_ref: Any) -> None:
        program = _Program(refs, segment)

        def step(
            position: Any, x: Array, dy: Array, carry: tuple[_Vectors, _Vectors]
        ) -> tuple[tuple[_Vectors, _Vectors], _Vectors]:
            """The next inputs and their incomplete gradients, and terms of the sums."""
            older, gradients = carry
            seen = program.seen(position)
            taken = program.inputs_of(x, older, seen)
            v = program.convolve(taken)
            share = sigmoid(v)
            dv = dy * share * (1.0 + v * (1.0 - share))
            through = [weight * dv for weight in program.weight]
            dx, *gradients_of_older = (
                gradient + jnp.where(seen >= before - tap, through[tap], 0.0)
                for tap, gradient in enumerate(gradients)
            )
            first = position - before  # whose last term this was
            program.store(dx_ref, first, dx, where=first >= program.start)
            terms = [dv * x for x in taken]
            terms += [dv, *(jnp.where(seen == i, dv, 0.0) for i in range(before))]
            return (taken[1:], (*gradients_of_older, through[-1])), tuple(terms)

        def group(i: Array, carry: tuple[Any, _Vectors]) -> tuple[Any, _Vectors]:
            window, sums = carry
            positions = [program.start + i * _GROUP + j for j in range(_GROUP)]
            # Fetched together, before the first is waited for.
            fetched = [
                (position, *(program.input_at(ref, position) for ref in (refs.x, dy_ref)))
                for position in positions
            ]
            for position, x, dy in fetched:
                window, terms = step(position, x, dy, window)
                sums = tuple(a + b for a, b in zip(sums, terms, strict=True))
            return window, sums

        zeros = jnp.zeros(_BLOCK, _f32)
        window = program.inputs_before(), (zeros,) * before
        window, sums = lax.fori_loop(
            0, program.groups, group, (window, (zeros,) * sums_ref.shape[2])
        )
        # The last gradients have terms of positions after the segment.
        end = program.start + program.groups * _GROUP
        for i in range(before):
            x, dy = (program.input_at(ref, end + i) for ref in (refs.x, dy_ref))
            window, _ = step(end + i, x, dy, window)
        for i, total in enumerate(sums):
            at = program.at(program.row, program.segment, i)
            triton.store(sums_ref.at[at], total, mask=program.exists)

    sums_shape = batch, grid[1], taps + 1 + before, channels
    outputs = (
        jax.ShapeDtypeStruct(inputs.x.shape, inputs.x.dtype),
        jax.ShapeDtypeStruct(sums_shape, _f32),
    )
    dx, sums = pl.pallas_call(
        causal_conv_backward,
        grid=grid,
        out_shape=outputs,
        compiler_params=_COMPILER,
        cost_estimate=kernel_cost(
            flops=0, exponentials=inputs.x.size, hbm_bytes=array_bytes(inputs, dy, outputs)
        ),
        name="causal_conv_backward",
    )(inputs, dy)
    by_row = sums.sum(1)
    total = by_row.sum(0)
    dinitial = _of_initial_inputs(inputs.weight, by_row[:, taps + 1 :])
    return _Inputs(
        x=dx,
        weight=total[:taps].astype(inputs.weight.dtype),
        bias=total[taps].astype(inputs.bias.dtype),
        initial_inputs=dinitial.astype(inputs.initial_inputs.dtype),
        seen=None,
        lengths=None,
    )


def _of_initial_inputs(
    weight: Float[Array, "kernel channels"], dfirst: Float[Array, "batch kernel-1 channels"]
) -> Float[Array, "batch kernel-1 channels"]:
    """Their gradients, given those of the convolution at the first positions of documents."""
    before = dfirst.shape[1]
    gradients = [
        sum(
            weight[i - position].astype(_f32)[None] * dfirst[:, position]
            for position in range(i + 1)
        )
        for i in range(before)
    ]
    return jnp.stack(gradients, axis=1)


def _grid(inputs: _Inputs, programs: int) -> tuple[int, tuple[int, int, int]]:
    """Positions of a program, and programs for channels, segments and rows.

    Args:
      programs: wanted at least, unless segments would be too short.
    """
    batch, length, channels = inputs.x.shape
    blocks, segment = pl.cdiv(channels, _BLOCK), MAX_SEGMENT
    while segment > MIN_SEGMENT and batch * blocks * pl.cdiv(length, segment) < programs:
        segment //= 2
    return segment, (blocks, pl.cdiv(length, segment), batch)
