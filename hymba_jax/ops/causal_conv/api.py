"""The depthwise causal convolution."""

from hymba_jax.ops.causal_conv.reference import causal_conv_reference
from hymba_jax.types import Array, Bool, Float, Int


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
    return causal_conv_reference(x, weight, bias, initial_inputs, resets, lengths)
