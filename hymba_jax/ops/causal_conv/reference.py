"""silu of the causal convolution, a sum of shifted products."""

import jax
import jax.numpy as jnp
from jax import lax

from hymba_jax.ops.documents import Documents
from hymba_jax.ops.platform import target_platform
from hymba_jax.ops.precision import einsum
from hymba_jax.ops.remat import ACTIVATION, named
from hymba_jax.types import Array, Float, Int


def causal_conv_reference(
    x: Float[Array, "batch length channels"],
    weight: Float[Array, "kernel channels"],
    bias: Float[Array, "channels"],
    initial_inputs: Float[Array, "batch kernel-1 channels"],
    documents: Documents | None = None,
    lengths: Int[Array, "batch"] | None = None,
) -> Float[Array, "batch length channels"]:
    """y of `causal_conv` as in its formula, summed in at least float32."""
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    before, length = weight.shape[0] - 1, x.shape[1]
    positions = jnp.arange(length)[None]
    if lengths is not None:
        valid = positions < lengths[:, None]
        x = jnp.where(valid[:, :, None], x, 0)
    seen = of_documents = None
    if documents is not None:
        # Made to depend on x: what is the same in all layers, such as the masks broadcast over
        # channels, would be computed before a scan over layers, and read in each.
        _, starts = lax.optimization_barrier((x[:1, :1, :1], documents.starts))
        starts = starts if lengths is None else starts & valid
        # From where the document of each position starts, if not before the first one.
        seen = positions - lax.cummax(jnp.where(starts, positions, -before), axis=1)
        of_documents = _of_initial_inputs(weight.astype(dtype), documents.state.astype(dtype))
    y = bias.astype(dtype)[None, None]
    y = y + _shifted_sum(x, weight.astype(dtype), initial_inputs, of_documents, seen)
    if lengths is not None:
        y = jnp.where(valid[:, :, None], y, 0)
    y = jax.nn.silu(y.astype(x.dtype))
    if target_platform() == "cpu":
        # Else XLA computes it in each of its uses, and writes padded inputs for all of them.
        y = lax.optimization_barrier(y)
    return named(ACTIVATION, y)


def _of_initial_inputs(
    weight: Float[Array, "kernel channels"], inputs: Float[Array, "batch kernel-1 channels"]
) -> Float[Array, "batch kernel-1 channels"]:
    """What initial inputs add to each of the first positions after them."""
    before = inputs.shape[1]
    sums = [
        sum(weight[tap][None] * inputs[:, position + tap] for tap in range(before - position))
        for position in range(before)
    ]
    return jnp.stack(sums, axis=1) if sums else inputs


@jax.custom_vjp
def _shifted_sum(
    x: Float[Array, "batch length channels"],
    weight: Float[Array, "kernel channels"],
    initial_inputs: Float[Array, "batch kernel-1 channels"],
    of_documents: Float[Array, "batch kernel-1 channels"] | None,
    seen: Int[Array, "batch length"] | None,
) -> Float[Array, "batch length channels"]:
    """The sum over taps of weight[tap] times its input, in weight's dtype.

    Args:
      of_documents: added at the first positions of each document.
      seen: positions of its own document before each; earlier inputs count as zeros.
    """
    terms = (
        row[None, None]
        * _own(_input_of(tap, x, initial_inputs).astype(row.dtype), tap, weight, seen)
        for tap, row in enumerate(weight)
    )
    total = sum(terms, start=jnp.zeros((), weight.dtype))
    if of_documents is not None and seen is not None:
        for position in range(of_documents.shape[1]):
            added = total + of_documents[:, position : position + 1]
            total = jnp.where((seen == position)[:, :, None], added, total)
    return total


def _shifted_sum_fwd(
    x: Array,
    weight: Array,
    initial_inputs: Array,
    of_documents: Array | None,
    seen: Array | None,
) -> tuple[Array, tuple[Array, Array, Array, Array | None]]:
    y = _shifted_sum(x, weight, initial_inputs, of_documents, seen)
    return y, (x, weight, initial_inputs, seen)


def _shifted_sum_bwd(
    residuals: tuple[Array, Array, Array, Array | None], dy: Array
) -> tuple[Array | None, ...]:
    """One sum of the shifted dy, rounded once; JAX's own gradient rounds each term.

    As y is rounded to the inputs' dtype, so is dy already. It is shifted in that dtype: XLA would
    write its conversion to memory.
    """
    x, weight, initial_inputs, seen = residuals
    before, dtype = weight.shape[0] - 1, weight.dtype
    dx, dinitial, dweight = jnp.zeros((), dtype), jnp.zeros((), dtype), []
    for tap, row in enumerate(weight):
        own, distance = _own(dy.astype(x.dtype), tap, weight, seen), before - tap
        shifted = _pad_length(own, -distance, distance)
        dx = dx + row[None, None] * shifted.astype(dtype)
        first = own[:, :before]
        of_initial = _pad_length(first, tap, before - tap - first.shape[1])
        dinitial = dinitial + row[None, None] * of_initial.astype(dtype)
        taken = _input_of(tap, x, initial_inputs).astype(dtype)
        dweight.append(_own(dy.astype(dtype) * taken, tap, weight, seen).sum((0, 1)))
    of_documents = None
    if seen is not None:
        is_there = seen[:, :, None] == jnp.arange(before)[None, None]
        # A matmul reads dy once, where a masked sum for each position would read it as often.
        of_documents = einsum(
            "blp,blc->bpc",
            is_there.astype(x.dtype),
            dy.astype(x.dtype),
            preferred_element_type=dtype,
        )
    dinputs = dx.astype(x.dtype), jnp.stack(dweight), dinitial.astype(x.dtype)
    return (*dinputs, of_documents, None)


_shifted_sum.defvjp(_shifted_sum_fwd, _shifted_sum_bwd)


def _input_of(tap: int, x: Array, initial_inputs: Array) -> Array:
    """The input that a tap is applied to, at each position.

    A sum of two padded arrays, which XLA fuses into what reads it; it writes a concatenation.
    """
    distance, length = initial_inputs.shape[1] - tap, x.shape[1]
    if not distance:
        return x
    return _pad_length(x, distance, -distance) + _pad_length(
        initial_inputs[:, tap:], 0, length - distance
    )


def _pad_length(v: Array, before: int, behind: int) -> Array:
    """v with zeros before and behind, or with fewer positions where the numbers are negative."""
    return lax.pad(v, jnp.zeros((), v.dtype), ((0, 0, 0), (before, behind, 0), (0, 0, 0)))


def _own(v: Array, tap: int, weight: Array, seen: Array | None) -> Array:
    """v where this tap's input belongs to the position's own document, else zeros."""
    if seen is None or tap == len(weight) - 1:
        return v
    zeros = (0 * seen).astype(v.dtype)  # not a constant, which would be an array before the scan
    return jnp.where((seen >= weight.shape[0] - 1 - tap)[:, :, None], v, zeros[:, :, None])
