"""The causal convolution as a sum of shifted products."""

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
        starts = documents.starts if lengths is None else documents.starts & valid
        # Where the document of each position starts, if not before the first one.
        latest = lax.cummax(jnp.where(starts, positions, -before), axis=1)
        document_inputs = documents.state.astype(x.dtype)

    inputs = jnp.concatenate([initial_inputs.astype(x.dtype), x], axis=1)
    y = bias.astype(dtype)[None, None]
    for tap in range(before + 1):
        shifted = inputs[:, tap : tap + length].astype(dtype)
        if documents is not None:
            shifted = jnp.where((positions - before + tap >= latest)[:, :, None], shifted, 0)
        y = y + weight[tap].astype(dtype)[None, None] * shifted
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
