"""The architecture, one idea of the paper a file."""

from hymba_jax.model.fuse import fuse_projections
from hymba_jax.model.hymba import Hymba, stack_layers, unstack_layers
from hymba_jax.model.lora import merge_adapters

__all__ = ["Hymba", "fuse_projections", "merge_adapters", "stack_layers", "unstack_layers"]
