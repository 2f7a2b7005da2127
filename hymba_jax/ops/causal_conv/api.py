"""Chooses an implementation of the depthwise causal convolution."""

from functools import partial

import jax
import jax.numpy as jnp

from hymba_jax.ops.causal_conv.final_inputs import final_inputs_of
from hymba_jax.ops.causal_conv.pallas_gpu import causal_conv_pallas_gpu, supports
from hymba_jax.ops.causal_conv.reference import causal_conv_reference
from hymba_jax.ops.causal_conv.sharded import causal_conv_sharded
from hymba_jax.ops.causal_conv.step import causal_conv_step
from hymba_jax.ops.documents import Documents, document_starts, first_positions
from hymba_jax.ops.platform import target_platform
from hymba_jax.parallel.shard_map import Axes, length_axis, shard_elements, shard_map
from hymba_jax.types import Array, Float, Int

_SEQUENCE: Axes = ("batch", "length", "channels")
AXES: dict[str, Axes] = {
    "x": _SEQUENCE,
    "weight": (None, "channels"),
    "bias": ("channels",),
    "initial_inputs": ("batch", None, "channels"),
    "starts": ("batch", "length"),
    "seen": ("batch", "length"),
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
    """silu of each channel's convolution with its own taps, over this and the earlier positions.

        y_t = silu(bias + sum over k of weight[k] x_{t - (kernel - 1) + k})

    so the last tap is applied to the current position, as in PyTorch's `Conv1d`. The sum is rounded
    to x's dtype before silu. The mesh in context may shard the length, unless `lengths` are given.

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
    if initial_inputs is None:
        initial_inputs = jnp.zeros((x.shape[0], before, x.shape[2]), x.dtype)
    initial_inputs = initial_inputs.astype(x.dtype)
    arrays = {"x": x, "weight": weight, "bias": bias, "initial_inputs": initial_inputs}
    on_gpu = target_platform().endswith("gpu")
    if x.shape[1] == 1 and segment_ids is None and on_gpu:
        results = (_SEQUENCE, AXES["initial_inputs"])
        return shard_map(causal_conv_step, AXES, results, **arrays, lengths=lengths)
    starts = None if segment_ids is None else document_starts(segment_ids)
    documents = None if starts is None else Documents(starts, initial_inputs)
    axis_name = length_axis(x.shape[1], at_least=before)
    if axis_name is not None and lengths is None:
        conv = partial(causal_conv_sharded, axis_name)
        y = shard_map(conv, AXES, _SEQUENCE, **arrays, starts=starts)
    elif on_gpu and supports(x, weight) and _fits(x):
        seen = None if starts is None else jnp.arange(x.shape[1])[None] - first_positions(starts)
        y = shard_map(causal_conv_pallas_gpu, AXES, _SEQUENCE, **arrays, seen=seen, lengths=lengths)
    else:
        y = causal_conv_reference(**arrays, documents=documents, lengths=lengths)
    return y, final_inputs_of(x, initial_inputs, documents, lengths)


def _fits(x: Array) -> bool:
    """Whether the kernels take a device's shard: a whole length, indexed by 32 bits."""
    return length_axis(x.shape[1]) is None and shard_elements(x, _SEQUENCE) < 2**31
