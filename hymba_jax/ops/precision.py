"""Matmul precision: float32 operands are not rounded.

By default a GPU rounds float32 operands to the 10 bits of TF32, and a TPU to the 7 of bfloat16.
Operands of other dtypes have the default precision.
"""

from functools import partial

import jax.numpy as jnp
from jax import lax

from hymba_jax.types import Array

_EXACT = lax.Precision.HIGHEST

dot = partial(jnp.dot, precision=_EXACT)
dot_general = partial(lax.dot_general, precision=_EXACT)
einsum = partial(jnp.einsum, precision=_EXACT)


def kernel_dot(a: Array, b: Array, contracted: tuple[int, int] = (1, 0)) -> Array:
    """A matmul inside a kernel, summed in float32: there only float32 operands have a precision.

    Args:
      contracted: axes of a and b.
    """
    i, j = contracted
    return lax.dot_general(
        a,
        b,
        (((i,), (j,)), ((), ())),
        precision=_EXACT if a.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )
