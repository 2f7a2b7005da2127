"""The depthwise causal convolution in front of the state-space model."""

from hymba_jax.ops.causal_conv.api import causal_conv

__all__ = ["causal_conv"]
