"""The causal convolution as a sum of shifted products."""

import jax
import jax.numpy as jnp
from jax import lax

from hymba_jax.ops.documents import Documents
from hymba_jax.types import Array, Float, Int


def causal_conv_reference(
    x: Float[Array, "batch length channels"],
    weight: Float[Array, "kernel channels"],
    bias: Float[Array, "channels"],
    initial_inputs: Float[Array, "batch kernel-1 channels"] | None = None,
    documents: Documents | None = None,
    lengths: Int[Array, "batch"] | None = None,
) -> tuple[Float[Array, "batch length channels"], Float[Array, "batch kernel-1 channels"]]:
    """`causal_conv` as in its formula, summed in at least float32."""
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    before, length = weight.shape[0] - 1, x.shape[1]
    positions = jnp.arange(length)[None]
    if initial_inputs is None:
        initial_inputs = jnp.zeros((x.shape[0], before, x.shape[2]), x.dtype)
    if lengths is not None:
        valid = positions < lengths[:, None]
        x = jnp.where(valid[:, :, None], x, 0)
    if documents is not None:
        # Made to depend on x: what is the same in all layers, such as the masks broadcast over
        # channels, would be computed before a scan over layers, and read in each.
        _, starts = lax.optimization_barrier((x[:1, :1, :1], documents.starts))
        starts = starts if lengths is None else starts & valid
        # Where the document of each position starts, if not before the first one.
        latest = lax.cummax(jnp.where(starts, positions, -before), axis=1)
        document_inputs = documents.state.astype(x.dtype)

    inputs = jnp.concatenate([initial_inputs.astype(x.dtype), x], axis=1)
    y = bias.astype(dtype)[None, None] + _shifted_sum(
        inputs, weight.astype(dtype), None if documents is None else positions - latest
    )
    if documents is not None:
        # All documents start from the same inputs.
        for position in range(before):
            seen = document_inputs[:, position:].astype(dtype)
            of_seen = (weight[: before - position].astype(dtype)[None] * seen).sum(1, keepdims=True)
            y = jnp.where((positions == latest + position)[:, :, None], y + of_seen, y)

    ends = length if lengths is None else lengths[:, None]
    last = ends + jnp.arange(-before, 0)[None]
    if lengths is None:
        final_inputs = inputs[:, length:]
    else:
        y = jnp.where(valid[:, :, None], y, 0)
        if length == 1:  # decoding, where a gather would dominate
            final_inputs = jnp.where(valid[:, :, None], inputs[:, 1:], inputs[:, :-1])
        else:
            final_inputs = jnp.take_along_axis(inputs, (last + before)[:, :, None], axis=1)
    if documents is not None and before:
        # If the last document is shorter than these, its initial inputs come first.
        start = latest[:, -1:]
        index = jnp.clip(before + last - start, 0, before - 1)
        of_before = jnp.take_along_axis(document_inputs, index[:, :, None], axis=1)
        final_inputs = jnp.where((last >= start)[:, :, None], final_inputs, of_before)
    return y.astype(x.dtype), final_inputs


@jax.custom_vjp
def _shifted_sum(
    inputs: Float[Array, "batch length_with_before channels"],
    weight: Float[Array, "kernel channels"],
    seen: Int[Array, "batch length"] | None,
) -> Float[Array, "batch length channels"]:
    """The sum over taps of weight[tap] times the inputs from that position on, in weight's dtype.

    Args:
      seen: positions of its own document before each; earlier inputs count as zeros.
    """
    length = inputs.shape[1] - weight.shape[0] + 1
    terms = (
        row[None, None] * _own(inputs[:, tap : tap + length].astype(row.dtype), tap, weight, seen)
        for tap, row in enumerate(weight)
    )
    return sum(terms, start=jnp.zeros((), weight.dtype))


def _shifted_sum_fwd(
    inputs: Array, weight: Array, seen: Array | None
) -> tuple[Array, tuple[Array, Array, Array | None]]:
    return _shifted_sum(inputs, weight, seen), (inputs, weight, seen)


def _shifted_sum_bwd(
    residuals: tuple[Array, Array, Array | None], dy: Array
) -> tuple[Array, Array, None]:
    """One sum of the shifted dy, rounded once; JAX's own gradient rounds each term.

    As y is rounded to the inputs' dtype, so is dy already. It is shifted in that dtype: XLA would
    write its conversion to memory.
    """
    inputs, weight, seen = residuals
    (before, dtype), length = (weight.shape[0] - 1, weight.dtype), dy.shape[1]
    dinputs, dweight = jnp.zeros((), dtype), []
    for tap, row in enumerate(weight):
        own = _own(dy.astype(inputs.dtype), tap, weight, seen)
        shifted = jnp.pad(own, ((0, 0), (tap, before - tap), (0, 0)))
        dinputs = dinputs + row[None, None] * shifted.astype(dtype)
        taken = inputs[:, tap : tap + length].astype(dtype)
        dweight.append((own.astype(dtype) * taken).sum((0, 1)))
    return dinputs.astype(inputs.dtype), jnp.stack(dweight), None


_shifted_sum.defvjp(_shifted_sum_fwd, _shifted_sum_bwd)


def _own(v: Array, tap: int, weight: Array, seen: Array | None) -> Array:
    """v where this tap's input belongs to the position's own document, else zeros."""
    if seen is None:
        return v
    zeros = (0 * seen).astype(v.dtype)  # not a constant, which would be an array before the scan
    return jnp.where((seen >= weight.shape[0] - 1 - tap)[:, :, None], v, zeros[:, :, None])
