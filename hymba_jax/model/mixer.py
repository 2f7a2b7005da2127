"""The idea of the paper: attention heads and SSM heads in parallel on the same input (eq. 2)."""

from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx

from hymba_jax.config import ComputeConfig, HymbaConfig
from hymba_jax.layer_pattern import LayerSpec
from hymba_jax.model.attention import Attention
from hymba_jax.model.cache import KeyValue, LayerPast, SSMState
from hymba_jax.model.layers import Linear, rms_norm
from hymba_jax.model.rope import Rope
from hymba_jax.model.ssm import SSM
from hymba_jax.types import Array, Float, Int


class Context(NamedTuple):
    """What every layer knows of the positions it is given.

    Attributes:
      lengths: positions of each row that count, where padding stands behind them.
    """

    rope: Rope
    lengths: Int[Array, "batch"] | None = None


class LayerOutput(NamedTuple):
    """A mixer's output, or its block's, and what the layer would remember of these positions."""

    x: Float[Array, "batch length hidden"]
    kv: KeyValue | None
    ssm: SSMState | None


class HybridMixer(nnx.Module):
    """out_proj(fuse(norm(attention(x)), norm(ssm(x)))).

    The scales of the two norms are the paper's beta vectors; fuse is the mean or, for row 11 of
    its Tab. 1, concatenation.
    """

    def __init__(
        self, config: HymbaConfig, spec: LayerSpec, compute: ComputeConfig, rngs: nnx.Rngs
    ):
        self.attention = Attention(config, spec, compute, rngs)
        self.ssm = SSM(config, compute, rngs)
        eps = config.norm_eps
        self.attention_norm = rms_norm(config.attention_channels, "channels", eps, compute)
        self.ssm_norm = rms_norm(config.channels, "channels", eps, compute)
        self.fuse = {"mean": _mean, "concat": _concat}[config.fusion]
        self.out_proj = _out_proj(config, spec, compute, rngs)

    def __call__(
        self,
        x: Float[Array, "batch length hidden"],
        context: Context,
        kv: KeyValue | None,
        past: LayerPast,
    ) -> LayerOutput:
        attention, kv = self.attention(x, context.rope, kv, past.kv)
        ssm, state = self.ssm(x, past.ssm, context.lengths)
        y = self.out_proj(self.fuse(self.attention_norm(attention), self.ssm_norm(ssm)))
        return LayerOutput(y, kv, state)


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
        kv: KeyValue | None,
        past: LayerPast,
    ) -> LayerOutput:
        attention, kv = self.attention(x, context.rope, kv, past.kv)
        return LayerOutput(self.out_proj(attention), kv, None)


class SSMMixer(nnx.Module):
    """SSM heads alone, which is a Mamba layer: out_proj(ssm(x))."""

    def __init__(
        self, config: HymbaConfig, spec: LayerSpec, compute: ComputeConfig, rngs: nnx.Rngs
    ):
        self.ssm = SSM(config, compute, rngs)
        self.out_proj = _out_proj(config, spec, compute, rngs)

    def __call__(
        self,
        x: Float[Array, "batch length hidden"],
        context: Context,
        kv: KeyValue | None,
        past: LayerPast,
    ) -> LayerOutput:
        ssm, state = self.ssm(x, past.ssm, context.lengths)
        return LayerOutput(self.out_proj(ssm), kv, state)


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


def _mean(attention: Array, ssm: Array) -> Array:
    return (attention + ssm) / 2


def _concat(attention: Array, ssm: Array) -> Array:
    return jnp.concatenate((attention, ssm), axis=-1)
