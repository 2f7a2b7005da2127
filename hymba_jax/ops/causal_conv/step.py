"""One position of the causal convolution, for decoding."""

from hymba_jax.ops.causal_conv.reference import causal_conv_reference
from hymba_jax.types import Array, Float


def causal_conv_step(
    x: Float[Array, "batch channels"],
    weight: Float[Array, "kernel channels"],
    bias: Float[Array, "channels"],
    *,
    inputs: Float[Array, "batch kernel-1 channels"],
) -> tuple[Float[Array, "batch channels"], Float[Array, "batch kernel-1 channels"]]:
    """`causal_conv` of one position, in time and memory that do not depend on those before it.

    Args:
      x, weight, bias: as there, without the length.
      inputs: the inputs just before this position, oldest first.

    Returns:
      y in x's dtype, and the `inputs` of the next position.
    """
    y, inputs = causal_conv_reference(x[:, None], weight, bias, inputs)
    return y[:, 0], inputs
