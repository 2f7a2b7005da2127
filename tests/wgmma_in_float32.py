"""`ops.wgmma.multiply_add` where there are no matrix instructions: by XLA, summed in float32."""

import jax
import jax.numpy as jnp


def multiply_add(*products):
    return tuple(c + jnp.matmul(_read(a), _read(b)) for c, a, b in products)


def _read(operand):
    value = operand if isinstance(operand, jax.Array) else operand[...]
    assert value.dtype == jnp.bfloat16
    return value.astype(jnp.float32)
