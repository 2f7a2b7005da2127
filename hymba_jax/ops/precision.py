"""Matmul precision: float32 operands are not rounded.

By default a GPU rounds float32 operands to the 10 bits of TF32, and a TPU to the 7 of bfloat16.
Operands of other dtypes have the default precision.
"""

from functools import partial

import jax.numpy as jnp
from jax import lax

_EXACT = lax.Precision.HIGHEST

dot = partial(jnp.dot, precision=_EXACT)
dot_general = partial(lax.dot_general, precision=_EXACT)
einsum = partial(jnp.einsum, precision=_EXACT)
