"""RMSNorm as Pallas kernels in Triton.

XLA reads a row for its mean square, and again for what is normalised; its gradient likewise. Here
a program holds a row in registers. The gradient of a scale is summed over the rows of a program,
one after the other, and then over programs: always in the same order.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from hymba_jax.ops.kernel_cost import array_bytes, kernel_cost
from hymba_jax.ops.remat import ACTIVATION, named
from hymba_jax.types import Array, Float

MIN_FEATURES, MAX_FEATURES = 256, 8192  # a row is worth a program, and fits in its registers
_PROGRAMS = 256  # of a gradient: two for each of a GPU's about 132 processors, at once

type Terms = Sequence[tuple[Float[Array, "rows features"], Float[Array, "features"]]]


def mean_of_norms_pallas_gpu(
    x: Float[Array, "*leading features"],
    scale: Float[Array, "features"],
    other: Float[Array, "*leading features"] | None = None,
    other_scale: Float[Array, "features"] | None = None,
    *,
    eps: float,
) -> Float[Array, "*leading features"]:
    """The mean of one or two inputs' RMSNorms."""
    terms = [(_rows(x), scale)]
    if other is not None and other_scale is not None:
        terms.append((_rows(other), other_scale))
    return _mean(tuple(terms), eps).reshape(x.shape)


def rms_norm_of_residual_pallas_gpu(
    x: Float[Array, "*leading features"], scale: Float[Array, "features"], *, eps: float
) -> tuple[Float[Array, "*leading features"], Float[Array, "*leading features"]]:
    """x and its RMSNorm."""
    residual, normed = _of_residual(_rows(x), scale, eps)
    return residual.reshape(x.shape), normed.reshape(x.shape)


def _rows(x: Array) -> Array:
    return x.reshape(-1, x.shape[-1])


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _mean(terms: Terms, eps: float) -> Array:
    return norm_rows(terms, eps)


def _mean_fwd(terms: Terms, eps: float) -> tuple[Array, Terms]:
    return named(ACTIVATION, norm_rows(terms, eps)), terms


def _mean_bwd(eps: float, terms: Terms, dy: Array) -> tuple[Terms]:
    return (_backward(terms, dy, None, eps),)


_mean.defvjp(_mean_fwd, _mean_bwd)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _of_residual(x: Array, scale: Array, eps: float) -> tuple[Array, Array]:
    return x, norm_rows([(x, scale)], eps)


def _of_residual_fwd(
    x: Array, scale: Array, eps: float
) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    return (x, named(ACTIVATION, norm_rows([(x, scale)], eps))), (x, scale)


def _of_residual_bwd(
    eps: float, term: tuple[Array, Array], cotangents: tuple[Array, Array]
) -> tuple[Array, Array]:
    dresidual, dy = cotangents
    ((dx, dscale),) = _backward((term,), dy, dresidual, eps)
    return dx, dscale


_of_residual.defvjp(_of_residual_fwd, _of_residual_bwd)


def norm_rows(terms: Terms, eps: float) -> Float[Array, "rows features"]:
    """The mean of the terms' RMSNorms, rounded once. A program computes a row.

    Args:
      terms: inputs, each with its scale.
    """
    x = terms[0][0]
    rows, features = x.shape

    def rms_norm_forward(term_refs: Any, ref: Any) -> None:
        column, exists = _columns(features)
        at = _at(pl.program_id(0), column)
        total = jnp.zeros(len(column), jnp.float32)
        for x_ref, scale_ref in term_refs:
            unit, _ = _unit(_load(x_ref, at, exists), features, eps)
            total = total + unit * _load(scale_ref, column, exists)
        triton.store(ref.at[at], (total / len(term_refs)).astype(ref.dtype), mask=exists)

    return pl.pallas_call(
        rms_norm_forward,
        grid=(rows,),
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        compiler_params=triton.CompilerParams(num_warps=4),
        cost_estimate=kernel_cost(flops=0, exponentials=0, hbm_bytes=array_bytes(terms, x)),
        name="rms_norm_forward",
    )(tuple(terms))


def _backward(terms: Terms, dy: Array, dresidual: Array | None, eps: float) -> Terms:
    """The gradient of each input, the residual stream's added, and of each scale."""
    rows, features = dy.shape
    rows_each = pl.cdiv(rows, _PROGRAMS)
    programs = pl.cdiv(rows, rows_each)

    def rms_norm_backward(term_refs: Any, dy_ref: Any, dresidual_ref: Any, *out_refs: Any) -> None:
        column, exists = _columns(features)
        program = pl.program_id(0)
        scales = [_load(scale_ref, column, exists) for _, scale_ref in term_refs]

        def add(i: Array, dscales: list[Array]) -> list[Array]:
            row = program * rows_each + i
            at, is_in = _at(row, column), exists & (row < rows)
            dmean = _load(dy_ref, at, is_in) / len(term_refs)
            sums = []
            for (x_ref, _), (dx_ref, _), scale, dscale in zip(
                term_refs, out_refs, scales, dscales, strict=True
            ):
                unit, factor = _unit(_load(x_ref, at, is_in), features, eps)
                dunit = dmean * scale
                dx = (dunit - unit * ((dunit * unit).sum() / features)) * factor
                if dresidual_ref is not None:
                    dx = dx + _load(dresidual_ref, at, is_in)
                triton.store(dx_ref.at[at], dx.astype(dx_ref.dtype), mask=is_in)
                sums.append(dscale + dmean * unit)
            return sums

        zeros = [jnp.zeros(len(column), jnp.float32) for _ in term_refs]
        for (_, dscale_ref), dscale in zip(
            out_refs, lax.fori_loop(0, rows_each, add, zeros), strict=True
        ):
            triton.store(dscale_ref.at[_at(program, column)], dscale, mask=exists)

    by_program = jax.ShapeDtypeStruct((programs, features), jnp.float32)
    shapes = tuple((jax.ShapeDtypeStruct(x.shape, x.dtype), by_program) for x, _ in terms)
    operands = terms, dy, dresidual
    gradients = pl.pallas_call(
        rms_norm_backward,
        grid=(programs,),
        out_shape=shapes,
        compiler_params=triton.CompilerParams(num_warps=8),
        cost_estimate=kernel_cost(flops=0, exponentials=0, hbm_bytes=array_bytes(operands, shapes)),
        name="rms_norm_backward",
    )(*operands)
    return tuple(
        (dx, dscales.sum(0).astype(scale.dtype))
        for (dx, dscales), (_, scale) in zip(gradients, terms, strict=True)
    )


def _columns(features: int) -> tuple[Array, Array]:
    """Columns of a row, padded to a size that Triton supports, and which of them exist."""
    column = jnp.arange(pl.next_power_of_2(features))
    return column, column < features


def _at(row: Any, column: Array) -> tuple[Array, Array]:
    return jnp.full_like(column, row), column


def _load(ref: Any, at: Any, exists: Array) -> Array:
    return triton.load(ref.at[at], mask=exists, other=0.0).astype(jnp.float32)


def _unit(x: Array, features: int, eps: float) -> tuple[Array, Array]:
    """x / rms(x), and 1 / rms(x)."""
    factor = lax.rsqrt(jnp.square(x).sum() / features + eps)
    return x * factor, factor
