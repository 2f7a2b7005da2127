"""Arrays of 8-bit integers with a scale for each row, as the cache may hold keys and values."""

from typing import NamedTuple

import jax.numpy as jnp
from jax.typing import DTypeLike

from hymba_jax.ops.int8_matmul import MAX_INT8
from hymba_jax.types import Array, Float, Int


class Int8Rows(NamedTuple):
    """integers * scale; the last axis is a row."""

    integers: Int[Array, "*rows width"]
    scale: Float[Array, "*rows 1"]

    @classmethod
    def of(cls, x: Float[Array, "*rows width"]) -> "Int8Rows":
        """x to half a scale, which is in x's dtype: symmetric, to nearest."""
        x32 = x.astype(jnp.float32)
        largest = jnp.abs(x32).max(-1, keepdims=True)
        scale = (jnp.where(largest == 0, 1, largest) / MAX_INT8).astype(x.dtype)
        integers = jnp.round(x32 / scale.astype(jnp.float32))
        return cls(jnp.clip(integers, -MAX_INT8, MAX_INT8).astype(jnp.int8), scale)

    @classmethod
    def zeros(cls, shape: tuple[int, ...], dtype: DTypeLike) -> "Int8Rows":
        """Rows of zeros, with scales of that dtype."""
        return cls(jnp.zeros(shape, jnp.int8), jnp.zeros((*shape[:-1], 1), dtype))

    def astype(self, dtype: DTypeLike) -> Float[Array, "*rows width"]:
        """As floats."""
        return (self.integers * self.scale.astype(jnp.float32)).astype(dtype)
