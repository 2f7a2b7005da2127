"""What the heads of few rows compute between their projections: two Pallas kernels in Triton.

The first updates the convolution's last inputs in place and multiplies what it computes with
x_proj, each program a sum over its channels. The second adds these sums, and has the inner norms,
dt_proj, and the recurrence, whose state it updates in place; beside it, it adds what the programs
of the attention's kernel have computed.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from hymba_jax.ops.attention.step_gpu import AttentionParts
from hymba_jax.ops.block_size import largest_block
from hymba_jax.ops.kernel_cost import array_bytes, kernel_cost
from hymba_jax.ops.layer_step.projections import (
    MIN_TILE,
    NORMED_ROWS,
    Int8Kernel,
    Kernel,
)
from hymba_jax.ops.selective_scan.step_gpu import scan_position
from hymba_jax.types import Array, Float, Int


class ScanSums(NamedTuple):
    """What the second kernel adds: each program's part of x_proj's outputs.

    Attributes:
      dt: padded to a width that Triton has.
    """

    dt: Float[Array, "programs rows padded_rank"]
    B: Float[Array, "programs rows state"]
    C: Float[Array, "programs rows state"]


class ScanParams(NamedTuple):
    """Parameters of the recurrence, as `model/ssm.py` has them.

    Attributes:
      x_proj_scale: x_proj's scales, if its kernel is of 8-bit integers.
    """

    x_proj_scale: Float[Array, "dt_B_C"] | None
    dt_norm: Float[Array, "dt_rank"]
    B_norm: Float[Array, "state"]
    C_norm: Float[Array, "state"]
    dt_proj: Float[Array, "dt_rank channels"]
    dt_bias: Float[Array, "channels"]
    A_log: Float[Array, "state channels"]
    D: Float[Array, "channels"]


def convolve_and_project(
    x: Float[Array, "rows channels"],
    weight: Float[Array, "taps channels"],
    bias: Float[Array, "channels"],
    initial_inputs: Float[Array, "rows taps-1 channels"],
    lengths: Int[Array, "rows"],
    x_proj: Kernel,
    state: int,
) -> tuple[Float[Array, "rows channels"], Float[Array, "rows taps-1 channels"], ScanSums]:
    """silu of the causal convolution, its last inputs after this position, and what x_proj makes.

    Args:
      lengths: 1, or 0 where the position is padding, which has no effect.
      state: width of B and of C, the last of x_proj's outputs.
    """
    rows, channels = x.shape
    before = initial_inputs.shape[1]
    integers = x_proj.integers if isinstance(x_proj, Int8Kernel) else x_proj
    rank = integers.shape[1] - 2 * state
    block = block_of(channels, channels, rows)
    widths = (max(pl.next_power_of_2(rank), MIN_TILE), state, state)
    operands = (x, weight, bias, initial_inputs, lengths, integers)
    shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (x, initial_inputs)]
    shapes += [
        jax.ShapeDtypeStruct((channels // block, rows, width), jnp.float32) for width in widths
    ]
    u, inputs, *sums = pl.pallas_call(
        partial(_convolve, before, block, (rank, state, state)),
        grid=(channels // block, pl.cdiv(rows, MIN_TILE)),
        out_shape=shapes,
        input_output_aliases={3: 1},
        compiler_params=triton.CompilerParams(num_warps=8 if block > 64 else 4),
        cost_estimate=kernel_cost(
            flops=2 * rows * channels * sum(widths),
            exponentials=x.size,
            hbm_bytes=array_bytes(operands, shapes),
        ),
        name="convolve_and_project",
    )(*operands)
    return u, inputs, ScanSums(*sums)


def _convolve(
    before: int,
    block: int,
    columns: tuple[int, int, int],
    x_ref: Any,
    weight_ref: Any,
    bias_ref: Any,
    inputs_ref: Any,
    lengths_ref: Any,
    x_proj_ref: Any,
    u_ref: Any,
    last_ref: Any,
    *sums_refs: Any,
) -> None:
    """Some channels of some rows."""
    program, row = pl.program_id(0), pl.program_id(1) * MIN_TILE + jnp.arange(MIN_TILE)
    channel = program * block + jnp.arange(block)
    exists = (row < x_ref.shape[0])[:, None]
    is_valid = triton.load(lengths_ref.at[row], mask=exists[:, 0], other=0)[:, None] > 0
    at = row[:, None], channel[None]

    def tap(i: int) -> tuple[Array, ...]:
        return row[:, None], jnp.full((1, 1), i), channel[None]

    inputs = [triton.load(inputs_ref.at[tap(i)], mask=exists, other=0.0) for i in range(before)]
    inputs.append(triton.load(x_ref.at[at], mask=exists, other=0.0))
    u = triton.load(bias_ref.at[channel]).astype(jnp.float32)[None]
    for i, value in enumerate(inputs):
        weight = triton.load(weight_ref.at[jnp.full_like(channel, i), channel])
        u = u + weight.astype(jnp.float32)[None] * value.astype(jnp.float32)
    u = jnp.where(is_valid, u.astype(u_ref.dtype).astype(jnp.float32), 0.0)
    u = (u * jax.nn.sigmoid(u)).astype(u_ref.dtype)
    triton.store(u_ref.at[at], u, mask=exists)
    for i in range(before):
        triton.store(
            last_ref.at[tap(i)], jnp.where(is_valid, inputs[i + 1], inputs[i]), mask=exists
        )
    start = 0
    for width, ref in zip(columns, sums_refs, strict=True):
        column = jnp.arange(ref.shape[-1])[None]
        kernel = triton.load(
            x_proj_ref.at[channel[:, None], start + column],
            mask=jnp.broadcast_to(column < width, (block, ref.shape[-1])),
            other=0,
        )
        sums = triton.dot(u, kernel.astype(u.dtype))
        triton.store(ref.at[jnp.full((1, 1), program), row[:, None], column], sums, mask=exists)
        start += width


def finish_heads(
    parts: AttentionParts,
    u: Float[Array, "rows channels"],
    z: Float[Array, "rows channels"],
    sums: ScanSums,
    params: ScanParams,
    state: Float[Array, "rows state channels"],
    lengths: Int[Array, "rows"],
    *,
    eps: float,
) -> tuple[
    Float[Array, "rows channels"],
    Float[Array, "rows channels"],
    Float[Array, "rows state channels"],
]:
    """Outputs of the attention heads, and of the SSM heads with their gate, and the state.

    Args:
      parts: of as many channels as the SSM heads have.
      u, sums: of `convolve_and_project`.
      lengths: 1, or 0 where the position is padding, which has no effect.
    """
    rows, channels = u.shape
    block = block_of(channels, parts.sums.shape[-1], rows)
    # Of many rows, several to a program, so that dt_proj is read less often.
    rows_of_program = 1 if rows <= NORMED_ROWS else 4
    are_sums = parts.totals is not None  # else there is nothing to add
    operands = (u, z, sums, params, state, lengths, parts if are_sums else None)
    outputs = (u, state, u) if are_sums else (u, state)
    y, state, *combined = pl.pallas_call(
        partial(_finish, block, rows_of_program, eps),
        grid=(pl.cdiv(rows, rows_of_program), channels // block),
        out_shape=[jax.ShapeDtypeStruct(a.shape, a.dtype) for a in outputs],
        input_output_aliases={len(jax.tree.leaves(operands[:4])): 1},
        compiler_params=triton.CompilerParams(num_warps=8 if block > 64 else 4),
        cost_estimate=kernel_cost(
            flops=2 * rows * params.dt_proj.size,
            exponentials=state.size,
            hbm_bytes=array_bytes(operands, outputs),
        ),
        name="finish_heads",
    )(*operands)
    attention = combined[0] if are_sums else parts.sums.reshape(rows, channels)
    return attention, y, state


def _finish(
    block: int,
    rows_of_program: int,
    eps: float,
    u_ref: Any,
    z_ref: Any,
    sums: ScanSums,
    params: ScanParams,
    state_ref: Any,
    lengths_ref: Any,
    parts: AttentionParts | None,
    y_ref: Any,
    last_ref: Any,
    *attention_refs: Any,
) -> None:
    """Some channels of some rows."""
    start, rows, dtype = pl.program_id(1) * block, u_ref.shape[0], u_ref.dtype
    channel = start + jnp.arange(block)
    rank, size = params.dt_norm.shape[0], params.B_norm.shape[0]
    refs: Any = params
    given, of_state = jnp.arange(sums.dt.shape[-1])[:, None], jnp.arange(size)[:, None]
    kernel = triton.load(
        refs.dt_proj.at[given, channel[None]],
        mask=jnp.broadcast_to(given < rank, (len(given), block)),
        other=0.0,
    )
    dt_bias, D = (triton.load(ref.at[channel]) for ref in (refs.dt_bias, refs.D))
    A = -jnp.exp(triton.load(refs.A_log.at[of_state, channel[None]]))

    def finish(row: Array, _: None) -> None:
        at = jnp.full_like(channel, row), channel
        place = jnp.full((1, 1), row), of_state, channel[None]
        if parts is not None:
            (ref,) = attention_refs
            triton.store(ref.at[at], _combined(parts, row, start, block).astype(dtype))
        dt, B, C = (
            _normed(ref, row, norm, column, refs.x_proj_scale, eps, dtype)
            for ref, norm, column in zip(sums, refs[1:4], (0, rank, rank + size), strict=True)
        )
        dt = (dt.astype(jnp.float32)[:, None] * kernel.astype(jnp.float32)).sum(0)
        dt = dt.astype(dtype).astype(jnp.float32) + dt_bias
        before = triton.load(state_ref.at[place])
        u, z = (triton.load(ref.at[at]).astype(jnp.float32) for ref in (u_ref, z_ref))
        B, C = (v.astype(jnp.float32) for v in (B, C))
        y, after = scan_position(before, u, dt, A, B, C, D, z)
        is_valid = triton.load(lengths_ref.at[row]) > 0
        triton.store(y_ref.at[at], jnp.where(is_valid, y, 0.0).astype(dtype))
        triton.store(last_ref.at[place], jnp.where(is_valid, after, before))

    first = pl.program_id(0) * rows_of_program
    lax.fori_loop(first, jnp.minimum(first + rows_of_program, rows), finish, None)


def _combined(parts: Any, row: Array, start: Array, block: int) -> Float[Array, "block"]:
    """`AttentionParts.combine` for channels of one head."""
    _, _, programs, heads, width = parts.sums.shape
    program = jnp.arange(pl.next_power_of_2(programs))
    exists = program < programs
    head = start // width
    of_head = (row, head // heads, program, head % heads)
    at = [jnp.broadcast_to(i, program.shape) for i in of_head]
    totals = triton.load(parts.totals.at[*at], mask=exists, other=0.0)
    largest = triton.load(parts.largest.at[*at], mask=exists, other=-jnp.inf)
    factors = jnp.exp(largest - largest.max(0))
    channel = start % width + jnp.arange(block)
    sums = triton.load(
        parts.sums.at[*(i[:, None] for i in at), channel[None]],
        mask=jnp.broadcast_to(exists[:, None], (len(program), block)),
        other=0.0,
    )
    return (sums * factors[:, None]).sum(0) / (totals * factors).sum(0)


def _normed(
    sums_ref: Any, row: Array, norm_ref: Any, start: int, scale_ref: Any, eps: float, dtype: Any
) -> Float[Array, "padded"]:
    """One row of an output of x_proj, of all programs' sums, after its norm."""
    programs, _, padded = sums_ref.shape
    width = norm_ref.shape[0]
    column = jnp.arange(padded)
    exists = column < width
    program = jnp.arange(pl.next_power_of_2(programs))[:, None]
    parts = triton.load(
        sums_ref.at[program, jnp.full((1, 1), row), column[None]],
        mask=jnp.broadcast_to(program < programs, (len(program), padded)),
        other=0.0,
    )
    x = parts.sum(0)
    if scale_ref is not None:
        x = x * triton.load(scale_ref.at[start + column], mask=exists, other=0.0)
    scale = triton.load(norm_ref.at[column], mask=exists, other=0.0)
    x = x.astype(dtype).astype(jnp.float32)  # rounded as XLA's matmul rounds
    factor = lax.rsqrt(jnp.square(x).sum() / width + eps)
    return (x * factor).astype(dtype) * scale


def block_of(channels: int, value_dim: int, rows: int) -> int:
    """Channels of a program, all of one attention head; more of many rows, as each program of the
    second kernel reads the sums of all programs of the first."""
    return largest_block(64 if rows <= NORMED_ROWS else 128, channels, value_dim)
