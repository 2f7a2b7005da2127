"""The selective state-space scan of Mamba (arXiv 2312.00752)."""

from hymba_jax.ops.selective_scan.api import selective_scan

__all__ = ["selective_scan"]
