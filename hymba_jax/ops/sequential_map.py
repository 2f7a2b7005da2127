"""A function of each element of a batch or list of blocks, one after the other."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from hymba_jax.types import Array


def sequential_map[Results](function: Callable[[Any], Results], xs: Any) -> Results:
    """As `lax.map`, for functions that JAX does not differentiate.

    The results of `lax.map` are zeros at first, which depend on nothing: XLA:CPU would allocate and
    fill those of all layers before it computes the first one. These begin as a value of xs.

    Args:
      function: of a tree of arrays.
      xs: the same tree, each array with a leading axis of equal size.

    Returns:
      the function's results, with the same leading axis.
    """

    function = jax.jit(function, inline=True)  # traced once for its shapes and the loop

    def step(results: Results, at: tuple[Array, Any]) -> tuple[Results, None]:
        i, x = at
        values = function(x)
        return jax.tree.map(
            lambda v, of: lax.dynamic_update_index_in_dim(v, of, i, 0), results, values
        ), None

    leaf = max(jax.tree.leaves(xs), key=lambda v: v.size)  # a small one may be a constant
    count, value = len(leaf), leaf[(0,) * leaf.ndim]
    shapes = jax.eval_shape(function, jax.tree.map(lambda v: v[0], xs))
    results = jax.tree.map(lambda of: jnp.full((count, *of.shape), value, of.dtype), shapes)
    return lax.scan(step, results, (jnp.arange(count), xs))[0]
