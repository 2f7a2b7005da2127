"""Matmuls of one input with several kernels as one matmul, for inference.

With one token at a time the fixed cost of a matmul counts: one large matmul reads its kernel up to
a third faster than several small ones. In training they are separate, as each has its own sharding.
"""

from collections.abc import Iterable
from typing import Any

import jax.numpy as jnp
from flax import nnx

from hymba_jax.model.hymba import Hymba
from hymba_jax.model.layers import FusedSlice, input_projections


def fuse_projections(model: Hymba) -> Hymba:
    """The same model, changed in place: the input projections of a mixer or an MLP are one matmul.

    Args:
      model: with `scan_layers=False`, without adapters.
    """
    for block in model.blocks():
        _fuse([getattr(block.mixer, name, None) for name in ("attention", "ssm")])
        if block.has_mlp:
            _fuse([block.mlp])
    return model


def _fuse(modules: Iterable[Any]) -> None:
    """Fuses the linear maps of modules that have the same input."""
    owners = input_projections(modules)
    linears = [getattr(module, name) for module, name in owners]
    fused = nnx.clone(linears[0])
    kernel = jnp.concatenate([linear.kernel[...] for linear in linears], axis=1)
    fused.kernel = nnx.Param(kernel, axes=("hidden", "projections"))
    start = 0
    for (module, name), linear in zip(owners, linears, strict=True):
        stop = start + linear.kernel.shape[1]
        setattr(module, name, FusedSlice(fused, start, stop))
        start = stop
