"""The architecture, one idea of the paper a file."""

from hymba_jax.model.hymba import Hymba

__all__ = ["Hymba"]
