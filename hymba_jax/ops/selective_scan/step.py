"""One position of the selective scan, for decoding."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from hymba_jax.ops.platform import target_platform
from hymba_jax.ops.selective_scan.output import skip_and_gate
from hymba_jax.ops.selective_scan.padding import mask_padding
from hymba_jax.ops.selective_scan.step_gpu import selective_scan_step_gpu, supports
from hymba_jax.types import Array, Bool, Float


def selective_scan_step(
    x: Float[Array, "batch channels"],
    dt: Float[Array, "batch channels"],
    A: Float[Array, "state channels"],
    B: Float[Array, "batch state"],
    C: Float[Array, "batch state"],
    D: Float[Array, "channels"] | None = None,
    z: Float[Array, "batch channels"] | None = None,
    dt_bias: Float[Array, "channels"] | None = None,
    *,
    state: Float[Array, "batch state channels"],
    valid: Bool[Array, "batch"] | None = None,
) -> tuple[Float[Array, "batch channels"], Float[Array, "batch state channels"]]:
    """`selective_scan` of one position, with constant time and memory.

    Args:
      x, dt, A, B, C, D, z, dt_bias: as there, without the length.
      state: the state after the position before.
      valid: rows that have this position; in the others it is padding, with y = 0, and their state
        stays. All rows if absent.

    Returns:
      y in x's dtype and the state after this position in float32.
    """
    arrays = (x, dt, A, B, C, D, z, dt_bias, state, valid)
    is_for_kernel = target_platform().endswith("gpu") and supports(state)
    return _by_kernel(*arrays) if is_for_kernel else _in_xla(*arrays)


def _in_xla(
    x: Array,
    dt: Array,
    A: Array,
    B: Array,
    C: Array,
    D: Array | None,
    z: Array | None,
    dt_bias: Array | None,
    state: Array,
    valid: Array | None,
) -> tuple[Array, Array]:
    dtype = x.dtype
    if valid is not None:
        x, dt, B, C, z = mask_padding(valid, x, dt, B, C, z)
    inputs, dt, A, B, C, h = (v.astype(jnp.float32) for v in (x, dt, A, B, C, state))
    if dt_bias is not None:
        dt = dt + dt_bias.astype(jnp.float32)[None]
    delta = jax.nn.softplus(dt)
    u = delta * inputs
    if target_platform() == "cpu":  # else XLA computes them, convolution included, for each state
        delta, u, B = lax.optimization_barrier((delta, u, B))
    h = jnp.exp(delta[:, None] * A[None]) * h + u[:, None] * B[:, :, None]
    y = (h * C[:, :, None]).sum(1)
    return skip_and_gate(y, inputs, D, z).astype(dtype), h


@jax.custom_vjp
def _by_kernel(*arrays: Any) -> tuple[Array, Array]:
    return selective_scan_step_gpu(*arrays)


def _forward(*arrays: Any) -> tuple[tuple[Array, Array], tuple[Any, ...]]:
    return _by_kernel(*arrays), arrays


def _backward(arrays: tuple[Any, ...], cotangents: tuple[Array, Array]) -> tuple[Any, ...]:
    return jax.vjp(_in_xla, *arrays)[1](cotangents)


_by_kernel.defvjp(_forward, _backward)


def selective_scan_single(
    x: Float[Array, "batch 1 channels"],
    dt: Float[Array, "batch 1 channels"],
    A: Float[Array, "state channels"],
    B: Float[Array, "batch 1 state"],
    C: Float[Array, "batch 1 state"],
    D: Float[Array, "channels"] | None = None,
    z: Float[Array, "batch 1 channels"] | None = None,
    dt_bias: Float[Array, "channels"] | None = None,
    initial_state: Float[Array, "batch state channels"] | None = None,
    valid: Bool[Array, "batch 1"] | None = None,
) -> tuple[Float[Array, "batch 1 channels"], Float[Array, "batch state channels"]]:
    """`selective_scan` of a sequence of length 1: the step, and no loop around it."""
    state = jnp.zeros((x.shape[0], *A.shape)) if initial_state is None else initial_state
    gate = None if z is None else z[:, 0]
    y, state = selective_scan_step(
        x[:, 0],
        dt[:, 0],
        A,
        B[:, 0],
        C[:, 0],
        D,
        gate,
        dt_bias,
        state=state,
        valid=None if valid is None else valid[:, 0],
    )
    return y[:, None], state
