"""Chooses an implementation of the selective scan."""

from hymba_jax.ops.selective_scan.reference import selective_scan_reference
from hymba_jax.ops.selective_scan.xla import selective_scan_xla
from hymba_jax.types import Array, Float

IMPLEMENTATIONS = {
    "reference": selective_scan_reference,
    "xla": selective_scan_xla,
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
    implementation: str | None = None,
) -> tuple[Float[Array, "batch length channels"], Float[Array, "batch state channels"]]:
    """Runs the input-dependent linear recurrence of Mamba over a sequence.

    With `delta = softplus(dt + dt_bias)`, per channel and state:

        h_t = exp(delta_t A) h_{t-1} + (delta_t x_t) B_t
        y_t = (sum over states of h_t C_t + D x_t) * silu(z_t)

    which is equation 2 of Mamba (arXiv 2312.00752), discretised as its algorithm 2 does and
    its code simplifies it (zero-order hold for A, Euler for B). All arithmetic is float32.

    Args:
      x: input of the state-space model, after convolution and activation.
      dt: time step before bias and softplus.
      A: continuous-time decay rates, negative.
      B: input projection, one vector a position.
      C: output projection, one vector a position.
      D: weight of the skip connection; none if absent.
      z: gate before its silu; no gate if absent.
      dt_bias: bias added to `dt`; none if absent.
      initial_state: the state before the first position; zeros if absent.
      implementation: a name in `IMPLEMENTATIONS`; by default the fastest for the platform.

    Returns:
      y in x's dtype and the state after the last position in float32.

    Raises:
      ValueError: `implementation` is not a known name.
    """
    name = "xla" if implementation is None else implementation
    if name not in IMPLEMENTATIONS:
        raise ValueError(
            f"unknown selective_scan implementation {name!r}; choose from {sorted(IMPLEMENTATIONS)}"
        )
    return IMPLEMENTATIONS[name](x, dt, A, B, C, D, z, dt_bias, initial_state)
