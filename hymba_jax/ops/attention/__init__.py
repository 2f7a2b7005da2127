"""Attention with a sliding window and meta tokens (paper, sections 2.2 and 2.4)."""

from hymba_jax.ops.attention.api import IMPLEMENTATIONS, attention

__all__ = ["IMPLEMENTATIONS", "attention"]
