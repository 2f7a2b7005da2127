"""What a sequence leaves to the next call of the causal convolution."""

import jax.numpy as jnp

from hymba_jax.ops.documents import Documents
from hymba_jax.types import Array, Float, Int


def final_inputs_of(
    x: Float[Array, "batch length channels"],
    initial_inputs: Float[Array, "batch before channels"],
    documents: Documents | None = None,
    lengths: Int[Array, "batch"] | None = None,
) -> Float[Array, "batch before channels"]:
    """The last `kernel - 1` inputs of the document of each row's last valid position.

    Args:
      initial_inputs: the inputs just before the first position.
    """
    before, length = initial_inputs.shape[1], x.shape[1]
    if lengths is None and length > before:  # no others matter, which may be on other devices
        last = slice(length - before, None)
        documents = documents and documents._replace(starts=documents.starts[:, last])
        x, length = x[:, last], before
    ends = length if lengths is None else lengths[:, None]
    last_positions = ends + jnp.arange(-before, 0)[None]
    if lengths is None:
        final_inputs = jnp.concatenate([initial_inputs[:, length:], x], axis=1)
    else:
        inputs = jnp.concatenate([initial_inputs, x], axis=1)
        if length == 1:  # decoding, where a gather would dominate
            is_valid = (lengths > 0)[:, None, None]
            final_inputs = jnp.where(is_valid, inputs[:, 1:], inputs[:, :-1])
        else:
            index = last_positions + before
            final_inputs = jnp.take_along_axis(inputs, index[:, :, None], axis=1)
    if documents is None or not before:
        return final_inputs
    # If the last document is shorter than these, its initial inputs come first.
    positions = jnp.arange(length)[None]
    starts = jnp.where(documents.starts & (positions < ends), positions, -before)
    start = starts.max(1, keepdims=True)
    index = jnp.clip(before + last_positions - start, 0, before - 1)
    of_document = jnp.take_along_axis(documents.state, index[:, :, None], axis=1)
    return jnp.where((last_positions >= start)[:, :, None], final_inputs, of_document)
