"""What positions have for each state, as matrices for the matrix units of TPUs.

An iteration of the scan's kernels has 16 positions. Its terms, a number for each position, state
and channel, are a matrix of (positions * states, channels). A vector of states for each position,
as B has, is a row of positions * states; spread over the positions it is a matrix, zero at the
states of others, whose product with the terms has each position's sum over states. A product with
the transposed terms has sums over channels; those that are a position's own make a row again.

Where x is in bfloat16, so are the operands of these matmuls; sums are in float32.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

from hymba_jax.ops.platform import target_platform
from hymba_jax.ops.precision import kernel_dot
from hymba_jax.types import Array, Bool, Float

POSITIONS = 16
"""Of an iteration. States are padded to a multiple of as many."""

LANES = 128

# A VMEM ref, a shape or a BlockSpec of an array, depending on the stage.
Ref = Any
Index = Array | int


def matmul_dtype(of_x: DTypeLike) -> Any:
    """Of the operands, from the dtype of x."""
    return jnp.bfloat16 if of_x == jnp.bfloat16 else jnp.float32


def _packed(dtype: DTypeLike) -> int:
    """Terms in 32 bits, which are of neighboring states."""
    return 2 if dtype == jnp.bfloat16 else 1


def to_packed_order(
    v: Float[Array, "*leading state channels"], dtype: DTypeLike
) -> Float[Array, "*leading state channels"]:
    """In the order that states have in the kernels, so that terms of neighbors are packed: in
    bfloat16 all even ones before all odd ones."""
    pairs = v.reshape(*v.shape[:-2], -1, _packed(dtype), v.shape[-1])
    return pairs.swapaxes(-3, -2).reshape(v.shape)


def from_packed_order(
    v: Float[Array, "*leading state channels"], dtype: DTypeLike
) -> Float[Array, "*leading state channels"]:
    """The inverse of `to_packed_order`."""
    parts = v.reshape(*v.shape[:-2], _packed(dtype), -1, v.shape[-1])
    return parts.swapaxes(-3, -2).reshape(v.shape)


def to_rows(
    v: Float[Array, "batch length state"], chunk: int
) -> Float[Array, "batch chunks iterations row"]:
    """The states of an iteration's positions in a row."""
    batch, _, state = v.shape
    return v.reshape(batch, -1, chunk // POSITIONS, POSITIONS * state).astype(jnp.float32)


def terms_shape(tiles: int, state: int, dtype: DTypeLike) -> Any:
    """Of VMEM for the terms of an iteration, of so many times 128 channels."""
    rows = POSITIONS * state // _packed(dtype)
    return pltpu.VMEM((tiles, rows, LANES), jnp.uint32 if dtype == jnp.bfloat16 else dtype)


def put_terms(ref: Ref, tile: int, t: Index, terms: Float[Array, "state lanes"]) -> None:
    """Stores those of the iteration's position t."""
    if ref.dtype == jnp.uint32:
        terms = _pack(*jnp.split(terms, 2))
    ref[tile, pl.ds(t * len(terms), len(terms))] = terms


def _pack(first: Float[Array, "pairs lanes"], second: Float[Array, "pairs lanes"]) -> Array:
    """Both in bfloat16, the first in the lower bits of 32."""
    if target_platform() == "tpu":
        packed: Array = pltpu.pack_elementwise((first, second), packed_dtype=jnp.bfloat16)
        return packed
    # Elsewhere the kernels are interpreted, and Pallas's interpreter does not know the instruction.
    low, high = (
        jax.lax.bitcast_convert_type(v.astype(jnp.bfloat16), jnp.uint16).astype(jnp.uint32)
        for v in (first, second)
    )
    return low | high << 16


def sum_over_states(a: Float[Array, "positions row"], ref: Ref, tile: int) -> Array:
    """The product of what `spread` made with the terms, (positions, lanes)."""
    return kernel_dot(a, _terms(ref, tile))


def sum_over_channels(a: Float[Array, "positions lanes"], ref: Ref, tile: int) -> Array:
    """The product with the transposed terms, (positions, row), for `add_own_states`."""
    terms = _terms(ref, tile)
    return kernel_dot(a.astype(terms.dtype), terms, (1, 1))


def _terms(ref: Ref, tile: int) -> Array:
    terms = ref[tile]
    return pltpu.bitcast(terms, jnp.bfloat16) if ref.dtype == jnp.uint32 else terms


def spread(row: Float[Array, "1 row"], dtype: DTypeLike) -> Float[Array, "positions row"]:
    """Each position's states, and zeros at those of others."""
    return jnp.where(_own_states(row.shape[1]), row, 0).astype(dtype)


def add_own_states(ref: Ref, i: Index, products: Float[Array, "positions row"]) -> None:
    """Adds to row i what each position has at its own states."""
    own = jnp.where(_own_states(products.shape[1]), products, 0)
    ref[pl.ds(i, 1)] += own.sum(0, keepdims=True)


def _own_states(width: int) -> Bool[Array, "positions width"]:
    """Where a position's own states are in a row."""
    position, column = (
        jax.lax.broadcasted_iota(jnp.int32, (POSITIONS, width), axis) for axis in (0, 1)
    )
    first = position * (width // POSITIONS)
    return (column >= first) & (column < first + width // POSITIONS)


def columns_of(
    row: Float[Array, "1 row"], dtype: DTypeLike
) -> Float[Array, "positions state lanes"]:
    """Each position's states along sublanes, the same in all lanes."""
    state, packed = row.shape[1] // POSITIONS, _packed(dtype)
    sublane, column = (jax.lax.broadcasted_iota(jnp.int32, (state, state), i) for i in range(2))
    # `to_packed_order`: 2 s is at sublane s, and 2 s + 1 at state / 2 + s, twice which is state - 1
    # more than that.
    is_odd = (sublane >= state // packed).astype(jnp.int32)
    own = column == sublane * packed - is_odd * (state - 1)
    diagonals = [
        jnp.where(own, row[:, t * state : (t + 1) * state], 0).astype(dtype)
        for t in range(POSITIONS)
    ]
    return over_lanes(jnp.concatenate(diagonals)).reshape(POSITIONS, state, LANES)


def over_lanes(rows: Float[Array, "rows columns"]) -> Float[Array, "rows lanes"]:
    """The sum of each row, the same in all lanes."""
    return kernel_dot(rows, jnp.ones((rows.shape[1], LANES), rows.dtype))
