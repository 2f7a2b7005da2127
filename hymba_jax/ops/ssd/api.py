"""Chooses an implementation of the SSD recurrence."""

from collections.abc import Callable
from functools import partial

import jax.numpy as jnp

from hymba_jax.ops.documents import Documents, document_starts
from hymba_jax.ops.platform import target_platform
from hymba_jax.ops.ssd.chunked import ssd_chunked
from hymba_jax.ops.ssd.pallas_gpu import ssd_pallas_gpu, supports
from hymba_jax.ops.ssd.pallas_tpu import ssd_pallas_tpu
from hymba_jax.ops.ssd.reference import ssd_reference
from hymba_jax.ops.ssd.sharded import ssd_sharded
from hymba_jax.ops.ssd.step import ssd_single
from hymba_jax.parallel.shard_map import Axes, length_axis, shard_map
from hymba_jax.types import Array, Bool, Float, Int

IMPLEMENTATIONS: dict[str, Callable[..., tuple[Array, Array]]] = {
    "chunked": ssd_chunked,
    "pallas_gpu": ssd_pallas_gpu,
    "pallas_tpu": ssd_pallas_tpu,
    "reference": ssd_reference,
}
_SEQUENCE: Axes = ("batch", "length", "ssm_heads", None)
_STATE: Axes = ("batch", "ssm_heads", None, None)


def ssd(
    x: Float[Array, "batch length ssm_heads ssm_head_dim"],
    dt: Float[Array, "batch length ssm_heads"],
    A: Float[Array, "ssm_heads"],
    B: Float[Array, "batch length ssm_groups state"],
    C: Float[Array, "batch length ssm_groups state"],
    D: Float[Array, "ssm_heads"] | None = None,
    dt_bias: Float[Array, "ssm_heads"] | None = None,
    *,
    initial_state: Float[Array, "batch ssm_heads ssm_head_dim state"] | None = None,
    segment_ids: Int[Array, "batch length"] | None = None,
    lengths: Int[Array, "batch"] | None = None,
    implementation: str | None = None,
) -> tuple[
    Float[Array, "batch length ssm_heads ssm_head_dim"],
    Float[Array, "batch ssm_heads ssm_head_dim state"],
]:
    """Runs the input-dependent linear recurrence of Mamba2 over a sequence.

    With `delta = softplus(dt + dt_bias)`, per head, whose group is h // (heads / groups):

        h_t = exp(delta_t A) h_{t-1} + delta_t x_t B_t^T
        y_t = h_t C_t + D x_t

    where A and D are one number a head (arXiv 2405.21060, section 5). All arithmetic is float32,
    but kernels round the operands of their matmuls to x's dtype.

    Args:
      x: input of each head, after convolution and activation.
      dt: time step before bias and softplus.
      A: continuous-time decay rates, negative.
      B: input projection, one vector per position and group.
      C: output projection, one vector per position and group.
      D: weight of the skip connection; optional.
      dt_bias: bias added to `dt`; optional.
      initial_state: the state before the first position; zeros if absent.
      segment_ids: the document of each position, where rows contain several. A document starts
        where the id changes, from `initial_state`. It does not depend on the others, provided
        that they are finite.
      lengths: valid positions of each row. The rest is padding: it has y = 0 and does not change
        the state.
      implementation: a name in `IMPLEMENTATIONS`; by default the fastest for the platform, or the
        single-step function for length 1.

    Returns:
      y in x's dtype, and in float32 the state after the last position: that of the last document.

    Raises:
      ValueError: `implementation` is not a known name or does not support the arguments or the
        platform, or the heads are not a multiple of the groups.
    """
    name = implementation or fastest(x, B, C)
    if name not in IMPLEMENTATIONS:
        raise ValueError(
            f"unknown ssd implementation {name!r}; choose from {sorted(IMPLEMENTATIONS)}"
        )
    batch, length, heads, head_dim = x.shape
    groups, state = B.shape[2:]
    if heads % groups:
        raise ValueError(f"{heads} heads are not a multiple of {groups} groups")
    is_step = implementation is None and length == 1
    starts = None if segment_ids is None or is_step else document_starts(segment_ids)
    if lengths is not None:
        # A time step of softplus(-inf) = 0 leaves the state unchanged.
        valid = (jnp.arange(length)[None] < lengths[:, None])[:, :, None]
        x, B, C = (jnp.where(valid[..., None], v, 0) for v in (x, B, C))
        dt = jnp.where(valid, dt, -jnp.inf)
        starts = None if starts is None else starts & valid[..., 0]
    if initial_state is None:
        initial_state = jnp.zeros((batch, heads, head_dim, state), jnp.float32)
    scan = ssd_single if is_step else IMPLEMENTATIONS[name]
    axis_name = length_axis(length)
    # A single group is read by the heads of all devices.
    of_group: Axes = ("batch", "length", "ssm_heads" if groups > 1 else None, None)
    return shard_map(
        partial(ssd_sharded, scan, axis_name) if axis_name else partial(_with_documents, scan),
        {
            "x": _SEQUENCE,
            "dt": _SEQUENCE[:3],
            "A": ("ssm_heads",),
            "B": of_group,
            "C": of_group,
            "D": ("ssm_heads",),
            "dt_bias": ("ssm_heads",),
            "initial_state": _STATE,
            "starts": ("batch", "length"),
        },
        (_SEQUENCE, _STATE),
        x=x,
        dt=dt,
        A=A,
        B=B,
        C=C,
        D=D,
        dt_bias=dt_bias,
        initial_state=initial_state,
        starts=starts,
    )


def fastest(
    x: Float[Array, "batch length ssm_heads ssm_head_dim"],
    B: Float[Array, "batch length ssm_groups state"],
    C: Float[Array, "batch length ssm_groups state"],
) -> str:
    """The implementation for the platform that is traced for."""
    platform = target_platform()
    if platform == "tpu":
        return "pallas_tpu"
    return "pallas_gpu" if platform == "gpu" and supports(x, B, C) else "chunked"


def _with_documents(
    scan: Callable[..., tuple[Array, Array]],
    *,
    initial_state: Float[Array, "batch ssm_heads ssm_head_dim state"],
    starts: Bool[Array, "batch length"] | None,
    **inputs: Array | None,
) -> tuple[Array, Array]:
    """The recurrence of whole rows, inside `shard_map`."""
    if starts is None:
        return scan(**inputs, initial_state=initial_state)
    documents = Documents(starts, initial_state)
    return scan(**inputs, initial_state=initial_state, documents=documents)
