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

    of_element = jax.jit(function, inline=True)  # traced once for its shapes and the loop

    def step(results: Results, at: tuple[Array, Any]) -> tuple[Results, None]:
        i, x = at
        return jax.tree.map(
            lambda buffer, value: lax.dynamic_update_index_in_dim(buffer, value, i, 0),
            results,
            of_element(x),
        ), None

    leaf = max(jax.tree.leaves(xs), key=lambda v: v.size)  # a small one may be a constant
    start = leaf[(0,) * leaf.ndim] if leaf.size else 0
    element = jax.tree.map(lambda v: jax.ShapeDtypeStruct(v.shape[1:], v.dtype), xs)
    results = jax.tree.map(
        lambda shape: jnp.full((len(leaf), *shape.shape), start, shape.dtype),
        jax.eval_shape(of_element, element),
    )
    return lax.scan(step, results, (jnp.arange(len(leaf)), xs))[0]
