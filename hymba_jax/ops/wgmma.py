"""Matmuls of a warpgroup on Hopper GPUs (wgmma), and arrays in the forms that they take.

Of c + a @ b, c is in registers in the layout `ROWS`; a is in such registers as bfloat16, or in
shared memory as `shared` allocates it, where b is, too.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from hymba_jax.types import Array

ROWS = plgpu.Layout.WGMMA
_TILED = (
    plgpu.TilingTransform((8, 64)),  # type: ignore[abstract]
    plgpu.SwizzleTransform(128),  # type: ignore[abstract]
)


def multiply_add(*products: tuple[Array, Any, Any]) -> tuple[Array, ...]:
    """c + a @ b for each (c, a, b), all of them begun before the first is waited for."""

    def begin(refs: Sequence[Any]) -> None:
        for ref, (_, a, b) in zip(refs, products, strict=True):
            plgpu.wgmma(ref, a, b)

    return tuple(pl.run_state(begin)([plgpu.ACC.init(c) for c, _, _ in products]))


def zeros(rows: int, columns: int) -> Array:
    """What matmuls are added to."""
    return plgpu.layout_cast(jnp.zeros((rows, columns), jnp.float32), ROWS)


def spread(numbers: Array, like: Array, axis: int) -> Array:
    """Numbers of rows (axis 0) or columns for all of `like`."""
    return lax.broadcast_in_dim(numbers, like.shape, (axis,))


def iota(like: Array, axis: int) -> Array:
    """The index of each row (axis 0) or column, for all of `like`."""
    return plgpu.broadcasted_iota(jnp.int32, like.shape, axis, layout=ROWS)


def shared(*shape: int) -> Any:
    """Shared memory for operands in bfloat16, whose rows are a multiple of 128 bytes."""
    return plgpu.SMEM(shape, jnp.bfloat16, transforms=_TILED)
