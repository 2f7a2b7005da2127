"""The idea of the paper: attention heads and SSM heads in parallel on the same input (eq. 2)."""

from collections.abc import Callable
from typing import ClassVar, Protocol

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from hymba_jax.config import ComputeConfig, HymbaConfig
from hymba_jax.config.layer_pattern import LayerSpec, SSMKind
from hymba_jax.model.attention import Attention
from hymba_jax.model.context import Context
from hymba_jax.model.kv_cache import AttendedKV, KVCache
from hymba_jax.model.layers import Linear, RMSNorm, make_norm
from hymba_jax.model.mamba2 import Mamba2
from hymba_jax.model.ssm import SSM
from hymba_jax.model.state import LayerOutput, LayerState, RecurrentState, StateFormats
from hymba_jax.ops.rms_norm import mean_of_norms
from hymba_jax.types import Array, Float

type NormAndHeads = tuple[RMSNorm, Float[Array, "batch length channels"]]


class SSMHeads(Protocol):
    """What a mixer asks of SSM heads of any kind; documented in `SSM`."""

    INPUT_PROJECTIONS: ClassVar[tuple[str, ...]]

    def __call__(
        self,
        x: Float[Array, "batch length hidden"],
        context: Context,
        state: RecurrentState | None,
    ) -> tuple[Float[Array, "batch length channels"], RecurrentState]: ...

    def init_state(
        self, batch: int, dtype: DTypeLike, state_dtype: DTypeLike
    ) -> RecurrentState: ...

    def flops(self, length: int) -> float: ...


SSM_KINDS: dict[SSMKind | None, Callable[[HymbaConfig, ComputeConfig, nnx.Rngs], SSMHeads]] = {
    "mamba": SSM,
    "mamba2": Mamba2,
}
"""The heads of each kind that a layer's spec may name."""


class HybridMixer(nnx.Module):
    """out_proj(fuse(norm(attention(x)), norm(ssm(x)))).

    The scales of the two norms are the paper's beta vectors; fuse is the mean or, for row 11 of
    its Tab. 1, concatenation.
    """

    def __init__(
        self, config: HymbaConfig, spec: LayerSpec, compute: ComputeConfig, rngs: nnx.Rngs
    ):
        self.attention = Attention(config, spec, compute, rngs)
        self.ssm = SSM_KINDS[spec.ssm](config, compute, rngs)
        eps = config.norm_eps
        self.attention_norm = make_norm(config.attention_channels, "channels", eps, compute)
        self.ssm_norm = make_norm(config.channels, "channels", eps, compute)
        self.fuse = {"mean": _mean, "concat": _concat}[config.fusion]
        self.out_proj = _out_proj(config, spec, compute, rngs)

    def __call__(
        self,
        x: Float[Array, "batch length hidden"],
        context: Context,
        state: LayerState,
        meta: KVCache | None,
        shared: AttendedKV | None,
    ) -> LayerOutput:
        attention, kv = self.attention(x, context, state.kv, meta, shared)
        ssm, ssm_state = self.ssm(x, context, state.ssm)
        y = self.out_proj(self.fuse((self.attention_norm, attention), (self.ssm_norm, ssm)))
        return LayerOutput(y, kv, ssm_state)

    def replay(
        self, x: Float[Array, "batch length hidden"], context: Context, state: LayerState
    ) -> RecurrentState:
        """The SSM heads' state after the valid positions, without an output."""
        return self.ssm(x, context, state.ssm)[1]

    def init_state(self, batch: int, max_length: int, formats: StateFormats) -> LayerState:
        return LayerState(
            self.attention.init_state(batch, max_length, formats.dtype, formats.kv_cache),
            self.ssm.init_state(batch, formats.dtype, formats.ssm_dtype),
        )

    def flops(self, length: int) -> float:
        return self.attention.flops(length) + self.ssm.flops(length)


class AttentionMixer(nnx.Module):
    """Attention heads alone: out_proj(attention(x))."""

    def __init__(
        self, config: HymbaConfig, spec: LayerSpec, compute: ComputeConfig, rngs: nnx.Rngs
    ):
        self.attention = Attention(config, spec, compute, rngs)
        self.out_proj = _out_proj(config, spec, compute, rngs)

    def __call__(
        self,
        x: Float[Array, "batch length hidden"],
        context: Context,
        state: LayerState,
        meta: KVCache | None,
        shared: AttendedKV | None,
    ) -> LayerOutput:
        attention, kv = self.attention(x, context, state.kv, meta, shared)
        return LayerOutput(self.out_proj(attention), kv, None)

    def replay(
        self, x: Float[Array, "batch length hidden"], context: Context, state: LayerState
    ) -> None:
        """There are no SSM heads."""

    def init_state(self, batch: int, max_length: int, formats: StateFormats) -> LayerState:
        return LayerState(
            kv=self.attention.init_state(batch, max_length, formats.dtype, formats.kv_cache)
        )

    def flops(self, length: int) -> float:
        return self.attention.flops(length)


class SSMMixer(nnx.Module):
    """SSM heads alone, which is a Mamba or Mamba2 layer: out_proj(ssm(x))."""

    def __init__(
        self, config: HymbaConfig, spec: LayerSpec, compute: ComputeConfig, rngs: nnx.Rngs
    ):
        self.ssm = SSM_KINDS[spec.ssm](config, compute, rngs)
        self.out_proj = _out_proj(config, spec, compute, rngs)

    def __call__(
        self,
        x: Float[Array, "batch length hidden"],
        context: Context,
        state: LayerState,
        meta: KVCache | None,
        shared: AttendedKV | None,
    ) -> LayerOutput:
        ssm, ssm_state = self.ssm(x, context, state.ssm)
        return LayerOutput(self.out_proj(ssm), None, ssm_state)

    def replay(
        self, x: Float[Array, "batch length hidden"], context: Context, state: LayerState
    ) -> RecurrentState:
        """The state after the valid positions, without an output."""
        return self.ssm(x, context, state.ssm)[1]

    def init_state(self, batch: int, max_length: int, formats: StateFormats) -> LayerState:
        return LayerState(ssm=self.ssm.init_state(batch, formats.dtype, formats.ssm_dtype))

    def flops(self, length: int) -> float:
        return self.ssm.flops(length)


def make_mixer(
    config: HymbaConfig, spec: LayerSpec, compute: ComputeConfig, rngs: nnx.Rngs
) -> HybridMixer | AttentionMixer | SSMMixer:
    """The mixer with the heads that the layer's spec names."""
    if spec.attention and spec.ssm:
        return HybridMixer(config, spec, compute, rngs)
    return (SSMMixer if spec.ssm else AttentionMixer)(config, spec, compute, rngs)


def _out_proj(
    config: HymbaConfig, spec: LayerSpec, compute: ComputeConfig, rngs: nnx.Rngs
) -> Linear:
    width = config.mixer_channels(spec)
    return Linear(width, config.hidden_size, ("channels", "hidden"), compute, rngs)


def _mean(attention: NormAndHeads, ssm: NormAndHeads) -> Array:
    (norm, x), (other_norm, other) = attention, ssm
    scales = norm.gathered(x.dtype), other_norm.gathered(other.dtype)
    return mean_of_norms(x, other, *scales, eps=norm.eps, axis=norm.axis)


def _concat(attention: NormAndHeads, ssm: NormAndHeads) -> Array:
    return jnp.concatenate([norm(heads) for norm, heads in (attention, ssm)], axis=-1)
