"""The SSM heads of a layer: Mamba (arXiv 2312.00752) with inner norms (paper, section 2.1)."""

from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from hymba_jax.config import ComputeConfig, HymbaConfig
from hymba_jax.model.context import Context
from hymba_jax.model.layers import Linear, make_norm, uniform
from hymba_jax.model.state import broadcast_to_batch
from hymba_jax.ops.causal_conv import causal_conv
from hymba_jax.ops.selective_scan import selective_scan
from hymba_jax.types import Array, Float

DT_MIN, DT_MAX = 1e-3, 1e-1  # initial time steps: Mamba, section 3.6


class SSMState(NamedTuple):
    """The last inputs of the convolution, and the state of the recurrence."""

    conv_state: Float[Array, "batch kernel-1 channels"]
    ssm_state: Float[Array, "batch state channels"]


class ScanInputs(NamedTuple):
    """What the recurrence takes of each position, and the convolution's state after the last.

    Attributes:
      dt: before its bias and the softplus.
    """

    u: Float[Array, "batch length channels"]
    dt: Float[Array, "batch length channels"]
    B: Float[Array, "batch length state"]
    C: Float[Array, "batch length state"]
    conv_state: Float[Array, "batch kernel-1 channels"]


class SSM(nnx.Module):
    """conv, silu, selective scan, gate.

    A_log, D and dt_bias are always float32: their rounding errors would accumulate over the
    sequence.
    """

    INPUT_PROJECTIONS: ClassVar[tuple[str, ...]] = ("in_proj", "gate_proj")

    def __init__(self, config: HymbaConfig, compute: ComputeConfig, rngs: nnx.Rngs):
        hidden, channels, ssm = config.hidden_size, config.channels, config.ssm
        rank, state, kernel = config.dt_rank, ssm.state_size, ssm.conv_kernel
        self.sizes = (rank, state, state)
        self.in_proj = Linear(hidden, channels, ("hidden", "channels"), compute, rngs)
        self.gate_proj = Linear(hidden, channels, ("hidden", "channels"), compute, rngs)
        self.conv_kernel = nnx.Param(
            uniform(kernel**-0.5)(rngs.params(), (kernel, channels), compute.param_dtype),
            axes=("conv_kernel", "channels"),
        )
        self.conv_bias = nnx.Param(jnp.zeros(channels, compute.param_dtype), axes=("channels",))
        self.x_proj = Linear(channels, sum(self.sizes), ("channels", "dt_B_C"), compute, rngs)
        self.dt_norm = make_norm(rank, "dt_rank", config.norm_eps, compute)
        self.B_norm = make_norm(state, "state", config.norm_eps, compute)
        self.C_norm = make_norm(state, "state", config.norm_eps, compute)
        self.dt_proj = Linear(
            rank,
            channels,
            ("dt_rank", "channels"),
            compute,
            rngs,
            init=uniform(rank**-0.5),
        )
        self.dt_bias = nnx.Param(initial_dt_bias(rngs.params(), channels), axes=("channels",))
        A = jnp.arange(1, state + 1, dtype=jnp.float32)
        self.A_log = nnx.Param(
            jnp.tile(jnp.log(A)[:, None], (1, channels)), axes=("state", "channels")
        )
        self.D = nnx.Param(jnp.ones(channels, jnp.float32), axes=("channels",))

    @jax.named_scope("ssm")
    def __call__(
        self,
        x: Float[Array, "batch length hidden"],
        context: Context,
        state: SSMState | None = None,
    ) -> tuple[Float[Array, "batch length channels"], SSMState]:
        """The heads' outputs, and the state after the last valid position.

        Args:
          state: the state before the first position of each document; zeros if absent.
        """
        state = broadcast_to_batch(state, len(x))
        scan = self.scan_inputs(x, context, state)
        y, ssm_state = selective_scan(
            scan.u,
            scan.dt,
            -jnp.exp(self.A_log[...]),
            scan.B,
            scan.C,
            self.D[...],
            z=self.gate_proj(x),
            dt_bias=self.dt_bias[...],
            initial_state=state and state.ssm_state,
            segment_ids=context.segment_ids,
            lengths=context.lengths,
        )
        return y, SSMState(scan.conv_state, ssm_state)

    def scan_inputs(
        self, x: Float[Array, "batch length hidden"], context: Context, state: SSMState | None
    ) -> ScanInputs:
        """The convolution, and the projections that select what the state keeps."""
        u, conv_state = causal_conv(
            self.in_proj(x),
            self.conv_kernel[...],
            self.conv_bias[...],
            initial_inputs=state and state.conv_state,
            segment_ids=context.segment_ids,
            lengths=context.lengths,
        )
        dt, B, C = jnp.split(self.x_proj(u), (self.sizes[0], sum(self.sizes[:2])), axis=-1)
        dt = self.dt_proj(self.dt_norm(dt))
        return ScanInputs(u, dt, self.B_norm(B), self.C_norm(C), conv_state)

    def init_state(self, batch: int, dtype: DTypeLike, state_dtype: DTypeLike) -> SSMState:
        """A state of zeros.

        Args:
          dtype: of the convolution's state.
          state_dtype: that the SSM state is stored in; it is computed in float32.
        """
        taps, channels = self.conv_kernel.shape[-2:]
        return SSMState(
            jnp.zeros((batch, taps - 1, channels), dtype),
            jnp.zeros((batch, self.sizes[1], channels), state_dtype),
        )

    def flops(self, length: int) -> float:
        """FLOPs of one sequence's convolution and scan.

        Per position and channel, 2 per tap of the convolution, and 9 per state of the scan: delta
        A, its exponential, times h; delta x, times B, their sum; times C, the sum over states; D
        and gate.
        """
        taps, channels = self.conv_kernel.shape[-2:]
        return float(length * channels * (9 * self.sizes[1] + 2 * taps))


def initial_dt_bias(key: Array, channels: int) -> Float[Array, " channels"]:
    """The bias whose softplus is log-uniform in [DT_MIN, DT_MAX]."""
    low, high = jnp.log(DT_MIN), jnp.log(DT_MAX)
    dt = jnp.exp(jax.random.uniform(key, (channels,), minval=low, maxval=high))
    return dt + jnp.log(-jnp.expm1(-dt))
