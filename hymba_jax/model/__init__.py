"""The architecture, one idea of the paper a file."""

from hymba_jax.model.fuse import fuse_projections
from hymba_jax.model.hymba import Hymba, stack_layers, unstack_layers

__all__ = ["Hymba", "fuse_projections", "stack_layers", "unstack_layers"]
