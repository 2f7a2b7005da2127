"""The depthwise causal convolution."""

from functools import partial

import jax
import jax.numpy as jnp

from hymba_jax.ops.causal_conv.reference import causal_conv_reference
from hymba_jax.ops.causal_conv.sharded import causal_conv_sharded
from hymba_jax.ops.causal_conv.step import causal_conv_step
from hymba_jax.ops.documents import Documents, document_starts
from hymba_jax.ops.platform import target_platform
from hymba_jax.parallel.shard_map import Axes, length_axis, shard_map
from hymba_jax.types import Array, Float, Int

_SEQUENCE: Axes = ("batch", "length", "channels")
AXES: dict[str, Axes] = {
    "x": _SEQUENCE,
    "weight": (None, "channels"),
    "bias": ("channels",),
    "initial_inputs": ("batch", None, "channels"),
    "starts": ("batch", "length"),
    "lengths": ("batch",),
}


@jax.named_scope("conv")
def causal_conv(
    x: Float[Array, "batch length channels"],
    weight: Float[Array, "kernel channels"],
    bias: Float[Array, "channels"],
    *,
    initial_inputs: Float[Array, "batch kernel-1 channels"] | None = None,
    segment_ids: Int[Array, "batch length"] | None = None,
    lengths: Int[Array, "batch"] | None = None,
) -> tuple[Float[Array, "batch length channels"], Float[Array, "batch kernel-1 channels"]]:
    """Convolves every channel with its own taps over the current and the earlier positions.

        y_t = bias + sum over k of weight[k] x_{t - (kernel - 1) + k}

    so the last tap is applied to the current position, as in PyTorch's `Conv1d`. No activation. The
    mesh in context may shard the length, unless `lengths` are given.

    Args:
      x: inputs.
      weight: taps, the oldest input's first.
      bias: added to every position.
      initial_inputs: the inputs just before the first position, oldest first; zeros if absent.
      segment_ids: the document of each position, where rows contain several. A document starts
        where the id changes, and `initial_inputs` precede each.
      lengths: valid positions of each row. The rest is padding, with y = 0.

    Returns:
      y in x's dtype, and the `initial_inputs` of the next call: the last `kernel - 1` inputs of the
      document of each row's last valid position, its `initial_inputs` included.
    """
    before = weight.shape[0] - 1
    documents = None
    if segment_ids is not None:
        if initial_inputs is None:
            initial_inputs = jnp.zeros((x.shape[0], before, x.shape[2]), x.dtype)
        documents = Documents(document_starts(segment_ids), initial_inputs)
    elif x.shape[1] == 1 and target_platform().endswith("gpu"):
        return shard_map(
            causal_conv_step,
            AXES,
            (_SEQUENCE, AXES["initial_inputs"]),
            x=x,
            weight=weight,
            bias=bias,
            initial_inputs=initial_inputs,
            lengths=lengths,
        )
    axis_name = length_axis(x.shape[1], at_least=before)
    if axis_name is None or lengths is not None:
        return causal_conv_reference(x, weight, bias, initial_inputs, documents, lengths)
    y = shard_map(
        partial(causal_conv_sharded, axis_name),
        AXES,
        _SEQUENCE,
        x=x,
        weight=weight,
        bias=bias,
        initial_inputs=initial_inputs,
        starts=documents and documents.starts,
    )
    last = slice(x.shape[1] - before, None)
    if documents is not None:
        documents = documents._replace(starts=documents.starts[:, last])
    return y, causal_conv_reference(x[:, last], weight, bias, None, documents)[1]
