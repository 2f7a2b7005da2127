"""The matmul of a few rows and a kernel in fewer bits than float32, on CPUs.

XLA:CPU would convert the whole kernel to floats before a dot, which takes up to four times as long
as a dot of floats. A loop over the kernel's rows converts a few of them at a time, in registers.
"""

import jax
import jax.numpy as jnp

from hymba_jax.ops.platform import target_platform
from hymba_jax.types import Array, Float, Int

KERNEL_ROWS = 8  # that the loop adds at a time
MAX_ROWS = {"int8": 16, "bfloat16": 1}
"""Rows of x up to which the loop is the fastest, by the kernel's dtype."""


def takes_few_rows(
    x: Float[Array, "*leading features"],
    kernel: Float[Array, "features outputs"] | Int[Array, "features outputs"],
) -> bool:
    """Whether `few_rows_matmul` is the fastest way to multiply them."""
    features = x.shape[-1]
    few = 0 < x.size <= MAX_ROWS.get(kernel.dtype.name, 0) * features
    return few and not features % KERNEL_ROWS and target_platform() == "cpu"


def few_rows_matmul(
    x: Float[Array, "*leading features"],
    kernel: Float[Array, "features outputs"] | Int[Array, "features outputs"],
) -> Float[Array, "*leading outputs"]:
    """x @ kernel in float32, as a sum of multiples of the kernel's rows; takes what
    `takes_few_rows` says."""
    rows = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    kernel_rows = kernel.reshape(-1, KERNEL_ROWS, kernel.shape[1])
    factors = rows.T.reshape(-1, KERNEL_ROWS, len(rows))

    def add(total: Array, i: Array) -> tuple[Array, None]:
        for row, factor in zip(kernel_rows[i], factors[i], strict=True):
            total = total + factor[:, None] * row[None].astype(jnp.float32)
        return total, None

    zeros = jnp.zeros((len(rows), kernel.shape[1]))
    total, _ = jax.lax.scan(add, zeros, jnp.arange(len(kernel_rows)))
    return total.reshape(*x.shape[:-1], -1)
