"""`selective_scan_step` on GPUs: a Pallas kernel in Triton that reads and writes the state once.

XLA makes two passes of it, one for the state and one for y.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from hymba_jax.ops.block_size import largest_block
from hymba_jax.ops.kernel_cost import array_bytes, kernel_cost
from hymba_jax.ops.selective_scan.output import skip_and_gate
from hymba_jax.ops.selective_scan.softplus import softplus
from hymba_jax.types import Array, Bool, Float

_MAX_BLOCK = 128  # channels of a program
_MIN_BLOCK = 16


def supports(state: Float[Array, "batch state channels"]) -> bool:
    """Whether the kernel takes such states: in float32, of sizes that Triton has."""
    _, size, channels = state.shape
    return state.dtype == jnp.float32 and size & (size - 1) == 0 and channels % _MIN_BLOCK == 0


def selective_scan_step_gpu(
    x: Float[Array, "batch channels"],
    dt: Float[Array, "batch channels"],
    A: Float[Array, "state channels"],
    B: Float[Array, "batch state"],
    C: Float[Array, "batch state"],
    D: Float[Array, "channels"] | None,
    z: Float[Array, "batch channels"] | None,
    dt_bias: Float[Array, "channels"] | None,
    state: Float[Array, "batch state channels"],
    valid: Bool[Array, "batch"] | None,
) -> tuple[Float[Array, "batch channels"], Float[Array, "batch state channels"]]:
    """As `selective_scan_step`, without a gradient."""
    batch, size, channels = state.shape
    block = largest_block(_MAX_BLOCK, channels)
    of_channels = pl.BlockSpec((block,), lambda b, i: (i,))
    by_row = pl.BlockSpec((None, block), lambda b, i: (b, i))
    of_state = pl.BlockSpec((None, size), lambda b, i: (b, 0))
    whole = pl.BlockSpec((None, size, block), lambda b, i: (b, 0, i))
    given: dict[str, tuple[Array | None, pl.BlockSpec]] = {
        "state": (state, whole),
        "x": (x, by_row),
        "dt": (dt, by_row),
        "A": (A, pl.BlockSpec((size, block), lambda b, i: (0, i))),
        "B": (B, of_state),
        "C": (C, of_state),
        "D": (D, of_channels),
        "z": (z, by_row),
        "dt_bias": (dt_bias, of_channels),
        "valid": (
            None if valid is None else valid.astype(jnp.int32),
            pl.BlockSpec((None,), lambda b, i: (b,)),
        ),
    }
    arrays = {name: array for name, (array, _) in given.items() if array is not None}
    y, state = pl.pallas_call(
        partial(_kernel, tuple(arrays)),
        grid=(batch, channels // block),
        in_specs=[given[name][1] for name in arrays],
        out_specs=[by_row, whole],
        out_shape=[jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (x, state)],
        input_output_aliases={0: 1},
        compiler_params=triton.CompilerParams(num_warps=4),
        cost_estimate=kernel_cost(
            flops=0,
            exponentials=state.size,
            hbm_bytes=array_bytes(arrays, x, state),
        ),
        name="selective_scan_step",
    )(*arrays.values())
    return y, state


def scan_position(
    h: Float[Array, "state channels"],
    x: Float[Array, "channels"],
    dt: Float[Array, "channels"],
    A: Float[Array, "state channels"],
    B: Float[Array, "state"],
    C: Float[Array, "state"],
    D: Float[Array, "channels"] | None,
    z: Float[Array, "channels"] | None,
) -> tuple[Float[Array, "channels"], Float[Array, "state channels"]]:
    """y and the state after a position of one sequence, in float32, in a kernel."""
    delta = softplus(dt, jnp.exp)
    h = jnp.exp(delta[None] * A) * h + (delta * x)[None] * B[:, None]
    return skip_and_gate((h * C[:, None]).sum(0), x, D, z), h


def _kernel(names: tuple[str, ...], *refs: Any) -> None:
    """Some channels of one sequence."""
    *inputs, y_ref, state_ref = refs
    given = {name: ref[...] for name, ref in zip(names, inputs, strict=True)}
    names = ("x", "dt", "A", "B", "C", "state")
    x, dt, A, B, C, h = (given[name].astype(jnp.float32) for name in names)
    if "dt_bias" in given:
        dt = dt + given["dt_bias"].astype(jnp.float32)
    y, after = scan_position(h, x, dt, A, B, C, given.get("D"), given.get("z"))
    if "valid" in given:
        is_valid = given["valid"] > 0
        y, after = jnp.where(is_valid, y, 0.0), jnp.where(is_valid, after, h)
    y_ref[...], state_ref[...] = y.astype(y_ref.dtype), after
