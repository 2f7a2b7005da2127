"""The matmul of activations and a kernel, with a gradient that every back end computes fast."""

import functools

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from hymba_jax.ops.few_rows import few_rows_matmul, takes_few_rows
from hymba_jax.ops.platform import target_platform
from hymba_jax.ops.precision import dot_general
from hymba_jax.ops.remat import MATMUL, named
from hymba_jax.parallel.mesh import gather, scatter
from hymba_jax.types import Array, Float

_ROWS = 2  # of which XLA:GPU makes a matmul


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def matmul(
    x: Float[Array, "*leading features"],
    kernel: Float[Array, "features outputs"],
    dtype: DTypeLike | None = None,
    axes: tuple[str, ...] = (),
) -> Float[Array, "*leading outputs"]:
    """x @ kernel, in x's dtype unless another is given; x and kernel have the same dtype.

    JAX's own gradient of the kernel is (dy x).T; XLA:CPU is up to five times as fast at x dy,
    which is laid out as the kernel is. On accelerators the two are the same matmul. The gradient
    of y is rounded to x's dtype first; that of the kernel is summed in float32.

    Args:
      axes: logical axes of a sharded kernel. It is gathered for each of the two passes, not kept
        gathered between them.
    """
    kernel, over = gather(kernel, axes), (((x.ndim - 1,), (0,)), ((), ()))
    if takes_few_rows(x, kernel):
        return few_rows_matmul(x, kernel).astype(dtype or x.dtype)
    product = functools.partial(dot_general, preferred_element_type=dtype or x.dtype)
    if x.size == x.shape[-1] and target_platform().endswith("gpu"):
        # Of one row XLA:GPU would multiply elementwise, rounding each product, and may write them.
        rows = jnp.broadcast_to(x.reshape(1, -1), (_ROWS, x.size))
        y = product(rows, kernel, (((1,), (0,)), ((), ())))[0]
        return y.reshape(*x.shape[:-1], -1)
    return product(x, kernel, over)


def _forward(
    x: Array, kernel: Array, dtype: DTypeLike | None, axes: tuple[str, ...]
) -> tuple[Array, tuple[Array, Array]]:
    return named(MATMUL, matmul(x, kernel, dtype, axes)), (x, kernel)


def _backward(
    _dtype: DTypeLike | None,
    axes: tuple[str, ...],
    residuals: tuple[Array, Array],
    dy: Array,
) -> tuple[Array, Array]:
    x, kernel = residuals
    kernel = gather(kernel, axes)
    dy = dy.astype(x.dtype)
    leading = tuple(range(x.ndim - 1))
    dx = dot_general(dy, kernel, (((dy.ndim - 1,), (1,)), ((), ())))
    dkernel = dot_general(x, dy, ((leading, leading), ((), ())), preferred_element_type=jnp.float32)
    return dx, scatter(dkernel.astype(kernel.dtype), axes)


matmul.defvjp(_forward, _backward)


def matmul_transposed(
    x: Float[Array, "batch length features"],
    kernel: Float[Array, "outputs features"],
    dtype: DTypeLike,
    axes: tuple[str, ...] = (),
) -> Float[Array, "batch length outputs"]:
    """x @ kernel.T, for a kernel that is also used untransposed."""
    if x.shape[1] > 1:
        return matmul(x, kernel.T, dtype, axes[::-1])
    # With few rows XLA:CPU would transpose the whole kernel first.
    y = dot_general(kernel, x[:, 0], (((1,), (1,)), ((), ())), preferred_element_type=dtype)
    return y.T[:, None]
