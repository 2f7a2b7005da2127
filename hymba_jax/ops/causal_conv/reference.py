"""The causal convolution as a sum of shifted products."""

import jax.numpy as jnp

from hymba_jax.types import Array, Float


def causal_conv_reference(
    x: Float[Array, "batch length channels"],
    weight: Float[Array, "kernel channels"],
    bias: Float[Array, "channels"],
    initial_inputs: Float[Array, "batch kernel-1 channels"] | None = None,
) -> tuple[Float[Array, "batch length channels"], Float[Array, "batch kernel-1 channels"]]:
    """`causal_conv` as its formula reads, summed in at least float32."""
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    kernel, length = weight.shape[0], x.shape[1]
    if initial_inputs is None:
        initial_inputs = jnp.zeros((x.shape[0], kernel - 1, x.shape[2]), x.dtype)
    inputs = jnp.concatenate([initial_inputs.astype(x.dtype), x], axis=1)
    y = bias.astype(dtype)[None, None]
    for tap in range(kernel):
        shifted = inputs[:, tap : tap + length].astype(dtype)
        y = y + weight[tap].astype(dtype)[None, None] * shifted
    return y.astype(x.dtype), inputs[:, length:]
