"""The matmul of activations and a kernel of 8-bit integers, one scale for each output."""

import jax
import jax.numpy as jnp

from hymba_jax.ops.platform import target_platform
from hymba_jax.ops.precision import dot
from hymba_jax.types import Array, Float, Int

MAX_INT8 = 127
MAX_ROWS = 16  # of x, up to which the loop below is the fastest on CPUs
KERNEL_ROWS = 8  # that the loop adds at a time


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
    features = x.shape[-1]
    few = 0 < x.size <= MAX_ROWS * features and not features % KERNEL_ROWS
    if few and target_platform() == "cpu":
        rows = x.reshape(-1, features).astype(jnp.float32)
        y = _by_kernel_rows(rows, kernel).reshape(*x.shape[:-1], -1)
    else:
        y = dot(x, kernel.astype(x.dtype), preferred_element_type=jnp.float32)
    return (y * jnp.broadcast_to(scale, y.shape)).astype(x.dtype)


def _by_kernel_rows(
    x: Float[Array, "rows features"], kernel: Int[Array, "features outputs"]
) -> Float[Array, "rows outputs"]:
    """A sum of multiples of the kernel's rows.

    XLA:CPU would write the whole kernel as floats before a dot, which takes up to four times as
    long as a float dot. In this loop it converts a few rows at a time, in registers.
    """
    kernel_rows = kernel.reshape(-1, KERNEL_ROWS, kernel.shape[1])
    factors = x.T.reshape(-1, KERNEL_ROWS, x.shape[0])

    def add(total: Array, i: Array) -> tuple[Array, None]:
        for row, factor in zip(kernel_rows[i], factors[i], strict=True):
            total = total + factor[:, None] * row[None].astype(jnp.float32)
        return total, None

    zeros = jnp.zeros((x.shape[0], kernel.shape[1]))
    return jax.lax.scan(add, zeros, jnp.arange(len(kernel_rows)))[0]
