"""The architecture, one idea of the paper a file."""

from hymba_jax.model.fuse import fuse_projections
from hymba_jax.model.hymba import Hymba, arrange_layers

__all__ = ["Hymba", "arrange_layers", "fuse_projections"]
