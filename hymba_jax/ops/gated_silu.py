"""silu(gate) * up, as between the matmuls of a gated MLP (arXiv 2002.05202)."""

import jax
from jax import lax

from hymba_jax.ops.remat import ACTIVATION, named
from hymba_jax.types import Array, Float


def _product(gate: Array, up: Array) -> Array:
    return jax.nn.silu(gate) * up


@jax.custom_vjp
def gated_silu(
    gate: Float[Array, "*leading channels"], up: Float[Array, "*leading channels"]
) -> Float[Array, "*leading channels"]:
    """silu(gate) * up, in their dtype. Its gradient keeps gate and up alone."""
    return _product(gate, up)


def _forward(gate: Array, up: Array) -> tuple[Array, tuple[Array, Array]]:
    return named(ACTIVATION, _product(gate, up)), (gate, up)


def _backward(residuals: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    """Each gradient is read by two matmuls. XLA for TPUs would rather compute that of the gate in
    both, and read three arrays of this size for one."""
    _, vjp = jax.vjp(_product, *residuals)
    return lax.optimization_barrier(vjp(dy))


gated_silu.defvjp(_forward, _backward)
