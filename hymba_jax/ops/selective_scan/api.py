"""Chooses an implementation of the selective scan."""

from collections.abc import Callable
from functools import partial

import jax.numpy as jnp

from hymba_jax.ops.documents import Documents, document_starts
from hymba_jax.ops.platform import target_platform
from hymba_jax.ops.selective_scan.associative import selective_scan_associative
from hymba_jax.ops.selective_scan.padding import mask_padding
from hymba_jax.ops.selective_scan.pallas_gpu import selective_scan_pallas_gpu
from hymba_jax.ops.selective_scan.pallas_tpu import selective_scan_pallas_tpu
from hymba_jax.ops.selective_scan.reference import selective_scan_reference
from hymba_jax.ops.selective_scan.sharded import selective_scan_sharded
from hymba_jax.ops.selective_scan.step import selective_scan_single
from hymba_jax.ops.selective_scan.xla import selective_scan_xla
from hymba_jax.parallel.shard_map import Axes, length_axis, shard_map
from hymba_jax.types import Array, Bool, Float, Int

IMPLEMENTATIONS = {
    "associative": selective_scan_associative,
    "pallas_gpu": selective_scan_pallas_gpu,
    "pallas_tpu": selective_scan_pallas_tpu,
    "reference": selective_scan_reference,
    "xla": selective_scan_xla,
}
# By platform; all others run `xla`.
FASTEST = {"gpu": "pallas_gpu", "newer gpu": "pallas_gpu", "tpu": "pallas_tpu"}
_SEQUENCE, _STATE = ("batch", "length", "channels"), ("batch", None, "channels")
AXES: dict[str, Axes] = {
    "x": _SEQUENCE,
    "dt": _SEQUENCE,
    "A": (None, "channels"),
    "B": ("batch", "length", None),
    "C": ("batch", "length", None),
    "D": ("channels",),
    "z": _SEQUENCE,
    "dt_bias": ("channels",),
    "initial_state": _STATE,
    "starts": ("batch", "length"),
    "valid": ("batch", "length"),
}


def selective_scan(
    x: Float[Array, "batch length channels"],
    dt: Float[Array, "batch length channels"],
    A: Float[Array, "state channels"],
    B: Float[Array, "batch length state"],
    C: Float[Array, "batch length state"],
    D: Float[Array, "channels"] | None = None,
    z: Float[Array, "batch length channels"] | None = None,
    dt_bias: Float[Array, "channels"] | None = None,
    *,
    initial_state: Float[Array, "batch state channels"] | None = None,
    segment_ids: Int[Array, "batch length"] | None = None,
    lengths: Int[Array, "batch"] | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "batch length channels"], Float[Array, "batch state channels"]]:
    """Runs the input-dependent linear recurrence of Mamba over a sequence.

    With `delta = softplus(dt + dt_bias)`, per channel and state:

        h_t = exp(delta_t A) h_{t-1} + (delta_t x_t) B_t
        y_t = (sum over states of h_t C_t + D x_t) * silu(z_t)

    which is equation 2 of Mamba (arXiv 2312.00752), discretised as its algorithm 2 does and
    its code simplifies it (zero-order hold for A, Euler for B). All arithmetic is float32, but that
    on TPUs, where x, B and C are in bfloat16, so are the factors in sums over states and over
    channels. There, what is not finite spoils up to 15 positions before it, too.

    Args:
      x: input of the state-space model, after convolution and activation.
      dt: time step before bias and softplus.
      A: continuous-time decay rates, negative.
      B: input projection, one vector per position.
      C: output projection, one vector per position.
      D: weight of the skip connection; optional.
      z: gate before its silu; optional.
      dt_bias: bias added to `dt`; optional.
      initial_state: the state before the first position; zeros if absent.
      segment_ids: the document of each position, where rows contain several. A document starts
        where the id changes, from `initial_state`. It does not depend on the others, provided, on
        TPUs, that they are finite.
      lengths: valid positions of each row. The rest is padding: it has y = 0 and does not change
        the state.
      implementation: a name in `IMPLEMENTATIONS`; by default the fastest for the platform, or the
        single-step function for length 1.

    Returns:
      y in x's dtype, and in float32 the state after the last position: that of the last document.

    Raises:
      ValueError: `implementation` is not a known name, or cannot run on this platform.
    """
    name = implementation or FASTEST.get(target_platform(), "xla")
    if name not in IMPLEMENTATIONS:
        raise ValueError(
            f"unknown selective_scan implementation {name!r}; choose from {sorted(IMPLEMENTATIONS)}"
        )
    is_step = implementation is None and x.shape[1] == 1
    starts = None if segment_ids is None or is_step else document_starts(segment_ids)
    valid = None if lengths is None else jnp.arange(x.shape[1])[None] < lengths[:, None]
    if valid is not None and not is_step:
        x, dt, B, C, z = mask_padding(valid, x, dt, B, C, z)
        starts = None if starts is None else starts & valid
    scan = selective_scan_single if is_step else IMPLEMENTATIONS[name]
    axis_name = length_axis(x.shape[1])
    return shard_map(
        partial(selective_scan_sharded, scan, axis_name)
        if axis_name
        else partial(_with_documents, scan),
        AXES,
        (_SEQUENCE, _STATE),
        x=x,
        dt=dt,
        A=A,
        B=B,
        C=C,
        D=D,
        z=z,
        dt_bias=dt_bias,
        initial_state=initial_state,
        starts=starts,
        **({"valid": valid} if is_step else {}),
    )


def _with_documents(
    scan: Callable[..., tuple[Array, Array]],
    A: Float[Array, "state channels"],
    *,
    initial_state: Float[Array, "batch state channels"] | None,
    starts: Bool[Array, "batch length"] | None,
    **inputs: Array | None,
) -> tuple[Array, Array]:
    """The scan of whole rows, inside `shard_map`."""
    if starts is None:
        return scan(A=A, **inputs, initial_state=initial_state)
    if initial_state is None:
        initial_state = jnp.zeros((starts.shape[0], *A.shape), jnp.float32)
    documents = Documents(starts, initial_state)
    return scan(A=A, **inputs, initial_state=initial_state, documents=documents)
