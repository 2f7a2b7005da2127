"""The SSM heads of Mamba2 (arXiv 2405.21060)."""

from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from hymba_jax.config import ComputeConfig, HymbaConfig
from hymba_jax.model.context import Context
from hymba_jax.model.layers import Linear, RMSNorm, uniform
from hymba_jax.model.ssm import initial_dt_bias
from hymba_jax.model.state import broadcast_to_batch
from hymba_jax.ops.causal_conv import causal_conv
from hymba_jax.ops.ssd import ssd
from hymba_jax.types import Array, Float

A_MIN, A_MAX = 1.0, 16.0  # initial decay rates, as in the paper's code


class Mamba2State(NamedTuple):
    """The last inputs of the convolutions of x and of B and C, and the state of the recurrence."""

    conv_state: Float[Array, "batch kernel-1 channels"]
    B_C_conv_state: Float[Array, "batch kernel-1 B_C"]
    ssm_state: Float[Array, "batch ssm_heads ssm_head_dim state"]


class Mamba2(nnx.Module):
    """norm(ssd(x, B, C, dt) * silu(gate)), with x, B and C behind a convolution and silu.

    A head has one time step and one decay rate, and the heads of a group share B and C; the norm is
    over the channels of a group. A_log, D and dt_bias are always float32, as in `SSM`.
    """

    INPUT_PROJECTIONS: ClassVar[tuple[str, ...]] = ("in_proj", "gate_proj", "B_C_proj", "dt_proj")

    def __init__(self, config: HymbaConfig, compute: ComputeConfig, rngs: nnx.Rngs):
        hidden, channels, heads = config.hidden_size, config.channels, config.ssm_heads
        ssm = config.ssm
        self.heads, self.head_dim = heads, ssm.head_dim
        self.groups, self.state_size = ssm.groups, ssm.state_size
        B_C = 2 * ssm.groups * ssm.state_size
        self.in_proj = Linear(hidden, channels, ("hidden", "channels"), compute, rngs)
        self.gate_proj = Linear(hidden, channels, ("hidden", "channels"), compute, rngs)
        self.B_C_proj = Linear(hidden, B_C, ("hidden", "B_C"), compute, rngs)
        self.dt_proj = Linear(hidden, heads, ("hidden", "ssm_heads"), compute, rngs)
        self.conv = CausalConv(ssm.conv_kernel, channels, "channels", compute, rngs)
        self.B_C_conv = CausalConv(ssm.conv_kernel, B_C, "B_C", compute, rngs)
        self.dt_bias = nnx.Param(initial_dt_bias(rngs.params(), heads), axes=("ssm_heads",))
        A = jax.random.uniform(rngs.params(), (heads,), minval=A_MIN, maxval=A_MAX)
        self.A_log = nnx.Param(jnp.log(A), axes=("ssm_heads",))
        self.D = nnx.Param(jnp.ones(heads, jnp.float32), axes=("ssm_heads",))
        of_group = (ssm.groups, channels // ssm.groups)
        axes = ("ssm_groups", "channels")
        self.norm = RMSNorm(of_group, axes, config.norm_eps, compute.param_dtype)

    @jax.named_scope("ssm")
    def __call__(
        self,
        x: Float[Array, "batch length hidden"],
        context: Context,
        state: Mamba2State | None = None,
    ) -> tuple[Float[Array, "batch length channels"], Mamba2State]:
        """The heads' outputs, and the state after the last valid position.

        Args:
          state: the state before the first position of each document; zeros if absent.
        """
        state = broadcast_to_batch(state, len(x))
        gate, dt = self.gate_proj(x), self.dt_proj(x)
        u, conv_state = self.conv(self.in_proj(x), context, state and state.conv_state)
        B_C, B_C_conv_state = self.B_C_conv(
            self.B_C_proj(x), context, state and state.B_C_conv_state
        )
        B, C = (v.reshape(*v.shape[:2], self.groups, -1) for v in jnp.split(B_C, 2, axis=-1))
        y, ssm_state = ssd(
            u.reshape(*u.shape[:2], self.heads, -1),
            dt,
            -jnp.exp(self.A_log[...]),
            B,
            C,
            self.D[...],
            dt_bias=self.dt_bias[...],
            initial_state=state and state.ssm_state,
            segment_ids=context.segment_ids,
            lengths=context.lengths,
        )
        y = y.reshape(u.shape) * jax.nn.silu(gate)
        y = self.norm(y.reshape(*y.shape[:2], self.groups, -1)).reshape(u.shape)
        return y, Mamba2State(conv_state, B_C_conv_state, ssm_state)

    def init_state(self, batch: int, dtype: DTypeLike, state_dtype: DTypeLike) -> Mamba2State:
        """A state of zeros.

        Args:
          dtype: of the convolutions' states.
          state_dtype: that the SSM state is stored in; it is computed in float32.
        """
        return Mamba2State(
            self.conv.init_state(batch, dtype),
            self.B_C_conv.init_state(batch, dtype),
            jnp.zeros((batch, self.heads, self.head_dim, self.state_size), state_dtype),
        )

    def flops(self, length: int) -> float:
        """FLOPs of one sequence's convolutions and recurrence.

        Per position, 2 per tap and channel of the convolutions; 5 per channel and state of the
        recurrence: decay times h, delta x times B, their sum; times C, the sum over states; and 4
        per channel: delta x, D x and its sum, gate.
        """
        taps, channels = self.conv.conv_kernel.shape[-2:]
        B_C = self.B_C_conv.conv_kernel.shape[-1]
        return float(length * (2 * taps * (channels + B_C) + channels * (5 * self.state_size + 4)))


class CausalConv(nnx.Module):
    """silu(conv(x)), each channel with its own taps; the state is the last kernel - 1 inputs."""

    def __init__(
        self, kernel: int, channels: int, axis: str, compute: ComputeConfig, rngs: nnx.Rngs
    ):
        taps = uniform(kernel**-0.5)(rngs.params(), (kernel, channels), compute.param_dtype)
        self.conv_kernel = nnx.Param(taps, axes=("conv_kernel", axis))
        self.conv_bias = nnx.Param(jnp.zeros(channels, compute.param_dtype), axes=(axis,))

    def __call__(
        self,
        x: Float[Array, "batch length channels"],
        context: Context,
        state: Float[Array, "batch _ channels"] | None,
    ) -> tuple[Float[Array, "batch length channels"], Float[Array, "batch _ channels"]]:
        return causal_conv(
            x,
            self.conv_kernel[...],
            self.conv_bias[...],
            initial_inputs=state,
            segment_ids=context.segment_ids,
            lengths=context.lengths,
        )

    def init_state(self, batch: int, dtype: DTypeLike) -> Float[Array, "batch _ channels"]:
        taps, channels = self.conv_kernel.shape[-2:]
        return jnp.zeros((batch, taps - 1, channels), dtype)
