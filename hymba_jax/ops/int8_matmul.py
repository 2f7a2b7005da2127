"""The matmul of activations and a kernel of 8-bit integers, one scale for each output."""

import jax.numpy as jnp

from hymba_jax.ops.few_rows import few_rows_matmul, takes_few_rows
from hymba_jax.ops.precision import dot
from hymba_jax.types import Array, Float, Int

MAX_INT8 = 127


def quantize(
    kernel: Float[Array, "features outputs"],
) -> tuple[Int[Array, "features outputs"], Float[Array, " outputs"]]:
    """Integers and scales, whose product is the kernel to half a scale: symmetric, to nearest."""
    kernel = kernel.astype(jnp.float32)
    largest = jnp.abs(kernel).max(0)
    scale = jnp.where(largest > 0, largest, 1) / MAX_INT8
    return jnp.round(kernel / scale[None]).astype(jnp.int8), scale


def int8_matmul(
    x: Float[Array, "*leading features"],
    kernel: Int[Array, "features outputs"],
    scale: Float[Array, " outputs"],
) -> Float[Array, "*leading outputs"]:
    """x @ (kernel * scale), in x's dtype."""
    if takes_few_rows(x, kernel):
        y = few_rows_matmul(x, kernel)
    else:
        y = dot(x, kernel.astype(x.dtype), preferred_element_type=jnp.float32)
    return (y * jnp.broadcast_to(scale, y.shape)).astype(x.dtype)
