"""Matmuls of few rows as Pallas kernels in Triton, with the norm before and what comes after.

A program computes some columns for all rows: the kernel is read once, and the rows, which are few,
by every program from the GPU's cache. Up to `NORMED_ROWS` each program normalises them itself; of
more, that would be most of its work, and another kernel does it once.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from hymba_jax.ops.block_size import largest_block
from hymba_jax.ops.kernel_cost import array_bytes, kernel_cost
from hymba_jax.ops.rms_norm.pallas_gpu import norm_rows
from hymba_jax.types import Array, Float, Int

MAX_ROWS = 128
NORMED_ROWS = 32
MIN_TILE = 16  # of Triton's smallest matmul: rows, and columns
_FEATURES, _KERNEL_TILE, _ROWS_TILE = 128, 4096, 8192  # of a tile: its width, and elements
_STAGES = 6  # tiles that are read ahead, for HBM's latency
_SHARED_MEMORY = 96 * 2**10  # bytes, that every GPU since Ampere has


class Int8Kernel(NamedTuple):
    """A kernel of 8-bit integers, one scale for each output (`ops/int8_matmul.py`)."""

    integers: Int[Array, "features outputs"]
    scale: Float[Array, "outputs"]


type Kernel = Float[Array, "features outputs"] | Int8Kernel


class NormedRows(NamedTuple):
    """Rows that are read as x / rms(x) * scale.

    Attributes:
      scale: None for rows that are read as they are.
    """

    x: Float[Array, "rows features"]
    scale: Float[Array, "features"] | None


def project_heads(
    rows: NormedRows,
    kernel: Kernel,
    cos: Float[Array, "rows half_dim"],
    sin: Float[Array, "rows half_dim"],
    *,
    outputs: Sequence[int],
    rotated: int,
    eps: float,
) -> list[Float[Array, "rows _"]]:
    """The input projections of a mixer, of which the first are heads that RoPE rotates.

    Args:
      outputs: columns of each projection.
      rotated: how many of these projections are rotated.
    """
    half = cos.shape[1]
    starts = [sum(outputs[:i]) for i in range(len(outputs) + 1)]

    def finish(sums: list[Array], column: Array, cos_ref: Any, sin_ref: Any, *refs: Any) -> None:
        row, exists = _row_index(cos_ref)
        angle = row[:, None], jnp.arange(half)[None]
        cos, sin = (triton.load(r.at[angle], mask=exists[:, None]) for r in (cos_ref, sin_ref))
        first, second = (a.astype(rows.x.dtype).astype(jnp.float32) for a in sums)
        turned = first * cos - second * sin, second * cos + first * sin
        is_turned = column < starts[rotated]
        halves = [jnp.where(is_turned, a, b) for a, b in zip(turned, (first, second), strict=True)]
        for ref, start, stop in zip(refs, starts[:-1], starts[1:], strict=True):

            @pl.when((start <= column) & (column < stop))
            def _(ref: Any = ref, start: int = start) -> None:
                for i, a in enumerate(halves):
                    _store(ref, a, column - start + i * half)

    return _matmul(
        [rows],
        kernel,
        (cos, sin),
        finish,
        outputs=outputs,
        columns=lambda program: (2 * half * program, 2 * half * program + half),
        width=half,
        programs=starts[-1] // (2 * half),
        eps=eps,
        name="project_heads",
    )


def project_gated(
    rows: NormedRows, kernel: Kernel, *, eps: float
) -> Float[Array, "rows half_the_outputs"]:
    """silu(x gate) * (x up), for a kernel whose columns are the gate's, then up's."""
    inner = jax.tree.leaves(kernel)[0].shape[1] // 2
    width = largest_block(32 if len(rows.x) <= NORMED_ROWS else 64, inner)

    def finish(sums: list[Array], column: Array, ref: Any) -> None:
        gate, up = (a.astype(rows.x.dtype).astype(jnp.float32) for a in sums)
        _store(ref, jax.nn.silu(gate) * up, column)

    (product,) = _matmul(
        [rows],
        kernel,
        (),
        finish,
        outputs=[inner],
        columns=lambda program: (width * program, inner + width * program),
        width=width,
        programs=inner // width,
        eps=eps,
        name="project_gated",
    )
    return product


def project_residual(
    terms: Sequence[NormedRows],
    kernel: Kernel,
    residual: Float[Array, "rows outputs"],
    *,
    eps: float,
) -> Float[Array, "rows outputs"]:
    """The residual plus the projection of the terms' mean."""
    hidden = residual.shape[1]
    # As few columns as make programs for most of a GPU's cores: the outputs are few.
    width = largest_block(MIN_TILE if len(residual) <= NORMED_ROWS else 32, hidden)

    def finish(sums: list[Array], column: Array, residual_ref: Any, ref: Any) -> None:
        row, exists = _row_index(residual_ref)
        at = row[:, None], (column + jnp.arange(width))[None]
        before = triton.load(residual_ref.at[at], mask=exists[:, None])
        _store(ref, before.astype(jnp.float32) + sums[0].astype(before.dtype), column)

    (y,) = _matmul(
        terms,
        kernel,
        (residual,),
        finish,
        outputs=[hidden],
        columns=lambda program: (width * program,),
        width=width,
        programs=hidden // width,
        eps=eps,
        name="project_residual",
    )
    return y


def _matmul(
    terms: Sequence[NormedRows],
    kernel: Kernel,
    others: tuple[Array, ...],
    finish: Any,
    *,
    outputs: Sequence[int],
    columns: Any,
    width: int,
    programs: int,
    eps: float,
    name: str,
) -> list[Array]:
    """Each program's sums, of `width` columns from each of `columns(program)`, and its `finish`."""
    if len(terms[0].x) > NORMED_ROWS and terms[0].scale is not None:
        terms = [NormedRows(norm_rows(cast(Any, terms), eps), None)]
    x = terms[0].x
    features, rows = x.shape[1], _padded(len(x))
    tile = largest_block(min(_FEATURES, _KERNEL_TILE // width, _ROWS_TILE // rows), features)
    ahead = tile * x.dtype.itemsize * (rows * len(terms) + width * len(columns(0)))

    def body(term_refs: Any, kernel_ref: Any, *refs: Any) -> None:
        starts = columns(pl.program_id(0))
        sums = _sums(term_refs, kernel_ref, starts, width, tile, eps)
        finish(sums, starts[0], *jax.tree.leaves(refs))

    operands = (tuple(terms), kernel, others)
    shapes = [jax.ShapeDtypeStruct((len(x), columns), x.dtype) for columns in outputs]
    total = jax.tree.leaves(kernel)[0].shape[1]
    return list(
        pl.pallas_call(
            body,
            grid=(programs,),
            out_shape=shapes,
            compiler_params=triton.CompilerParams(
                num_warps=8 if rows == MAX_ROWS else 4,
                num_stages=min(_STAGES, _SHARED_MEMORY // ahead),
            ),
            cost_estimate=kernel_cost(
                flops=2 * rows * features * total,
                exponentials=0,
                hbm_bytes=array_bytes(operands, shapes),
            ),
            name=name,
        )(*operands)
    )


def _sums(
    terms: Sequence[NormedRows],
    kernel: Any,
    starts: Sequence[Array],
    width: int,
    tile: int,
    eps: float,
) -> list[Float[Array, "rows width"]]:
    """The mean of the terms times some columns of the kernel, of refs, in float32."""
    x_ref = terms[0].x
    dtype, features = x_ref.dtype, x_ref.shape[1]
    row, exists = _row_index(x_ref)
    integers: Any = kernel.integers if isinstance(kernel, Int8Kernel) else kernel

    def load(ref: Any, block: Array) -> Array:
        at = row[:, None], (block * tile + jnp.arange(tile))[None]
        return triton.load(ref.at[at], mask=exists[:, None], other=0.0)

    def square(ref: Any, block: Array, total: Array) -> Array:
        return total + jnp.square(load(ref, block).astype(jnp.float32))

    def factor(term: NormedRows) -> Array | None:
        """1 / rms of each row."""
        if term.scale is None:
            return None
        zeros = jnp.zeros((len(row), tile), jnp.float32)
        squares = lax.fori_loop(0, features // tile, functools.partial(square, term.x), zeros)
        return lax.rsqrt(squares.sum(1) / features + eps)

    factors = [factor(term) for term in terms]

    def normed(term: NormedRows, of_rows: Array | None, block: Array) -> Array:
        x, scale_ref = load(term.x, block), cast(Any, term.scale)
        if of_rows is None:
            return x
        scale = triton.load(scale_ref.at[block * tile + jnp.arange(tile)])
        return (x.astype(jnp.float32) * of_rows[:, None]).astype(dtype) * scale[None]

    def add(block: Array, sums: list[Array]) -> list[Array]:
        at = block * tile + jnp.arange(tile)
        rows = [normed(term, factor, block) for term, factor in zip(terms, factors, strict=True)]
        mean = rows[0]
        if len(rows) > 1:
            total = functools.reduce(jnp.add, (x.astype(jnp.float32) for x in rows))
            mean = (total / len(rows)).astype(dtype)
        tiles = (
            triton.load(integers.at[at[:, None], (start + jnp.arange(width))[None]])
            for start in starts
        )
        return [
            total + triton.dot(mean, weights.astype(dtype))
            for total, weights in zip(sums, tiles, strict=True)
        ]

    zeros = [jnp.zeros((len(row), width), jnp.float32) for _ in starts]
    sums = lax.fori_loop(0, features // tile, add, zeros)
    if not isinstance(kernel, Int8Kernel):
        return sums
    scale: Any = kernel.scale
    scales = [triton.load(scale.at[start + jnp.arange(width)]) for start in starts]
    return [a * b[None] for a, b in zip(sums, scales, strict=True)]


def _row_index(x: Any) -> tuple[Array, Array]:
    """Of the rows of a matmul, and which of them exist."""
    row = jnp.arange(_padded(x.shape[0]))
    return row, row < x.shape[0]


def _padded(rows: int) -> int:
    """Rows, padded to a size that Triton supports."""
    return max(MIN_TILE, pl.next_power_of_2(rows))


def _store(ref: Any, values: Float[Array, "rows width"], start: Array) -> None:
    """Writes columns of the rows that exist."""
    row, exists = _row_index(ref)
    at = row[:, None], (start + jnp.arange(values.shape[1]))[None]
    triton.store(ref.at[at], values.astype(ref.dtype), mask=exists[:, None])
