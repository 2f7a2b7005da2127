"""The depthwise causal convolution."""

from functools import partial

from hymba_jax.ops.by_device import Axes, by_device, length_axis
from hymba_jax.ops.causal_conv.reference import causal_conv_reference
from hymba_jax.ops.causal_conv.sharded import causal_conv_sharded
from hymba_jax.types import Array, Bool, Float, Int

_SEQUENCE: Axes = ("batch", "length", "channels")
AXES: dict[str, Axes] = {
    "x": _SEQUENCE,
    "weight": (None, "channels"),
    "bias": ("channels",),
    "initial_inputs": ("batch", None, "channels"),
    "resets": ("batch", "length"),
}


def causal_conv(
    x: Float[Array, "batch length channels"],
    weight: Float[Array, "kernel channels"],
    bias: Float[Array, "channels"],
    *,
    initial_inputs: Float[Array, "batch kernel-1 channels"] | None = None,
    resets: Bool[Array, "batch length"] | None = None,
    lengths: Int[Array, "batch"] | None = None,
) -> tuple[Float[Array, "batch length channels"], Float[Array, "batch kernel-1 channels"]]:
    """Convolves every channel with its own taps over the current and the earlier positions.

        y_t = bias + sum over k of weight[k] x_{t - (kernel - 1) + k}

    so the last tap meets the current position (the order of PyTorch's `Conv1d`). No activation.
    The mesh in context may split the length, unless `lengths` are given.

    Args:
      x: inputs.
      weight: taps, the oldest input's first.
      bias: added to every position.
      initial_inputs: the inputs just before the first position, oldest first; zeros if absent.
      resets: where true, the inputs before that position count as zero from there on: a document
        starts there.
      lengths: positions of each row that count. Those after them have y = 0, whatever they hold.

    Returns:
      y in x's dtype, and the last `kernel - 1` inputs that count, zeros for those before a reset:
      the `initial_inputs` of what follows.
    """
    before = weight.shape[0] - 1
    axis_name = length_axis(x.shape[1], at_least=before)
    if axis_name is None or lengths is not None:
        return causal_conv_reference(x, weight, bias, initial_inputs, resets, lengths)
    y = by_device(
        partial(causal_conv_sharded, axis_name),
        AXES,
        _SEQUENCE,
        x=x,
        weight=weight,
        bias=bias,
        initial_inputs=initial_inputs,
        resets=resets,
    )
    last = slice(x.shape[1] - before, None)
    resets = None if resets is None else resets[:, last]
    return y, causal_conv_reference(x[:, last], weight, bias, None, resets)[1]
