"""The depthwise causal convolution in front of the state-space model."""

from hymba_jax.ops.causal_conv.api import causal_conv
from hymba_jax.ops.causal_conv.step import causal_conv_step

__all__ = ["causal_conv", "causal_conv_step"]
