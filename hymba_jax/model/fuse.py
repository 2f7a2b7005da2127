"""Matmuls of one input with several kernels as one matmul, for inference.

With one token at a time the fixed cost of a matmul counts: one large matmul reads its kernel up to
a third faster than several small ones. In training kernels stay apart, as each is sharded along
axes of its own.
"""

from collections.abc import Sequence

import jax.numpy as jnp
from flax import nnx

from hymba_jax.model.hymba import Hymba
from hymba_jax.model.layers import Linear
from hymba_jax.types import Array, Float


class Part(nnx.Module):
    """Some outputs of a linear map; what several of them share is computed once."""

    def __init__(self, whole: Linear, start: int, stop: int):
        self.whole = whole
        self.start, self.stop = start, stop

    def __call__(self, x: Float[Array, "*leading features"]) -> Float[Array, "*leading outputs"]:
        return self.whole(x)[..., self.start : self.stop]


def fuse_projections(model: Hymba) -> Hymba:
    """The same model, changed in place: each mixer begins with one matmul, and so does each MLP.

    Args:
      model: with `scan_layers=False`.
    """
    for block in model.blocks():
        heads = [getattr(block.mixer, name, None) for name in ("attention", "ssm")]
        _fuse(heads, ("query_proj", "key_proj", "value_proj", "in_proj", "gate_proj"))
        _fuse([block.mlp], ("gate_proj", "up_proj"))
    return model


def _fuse(modules: Sequence[nnx.Module | None], names: Sequence[str]) -> None:
    """Makes one linear map of those that these modules have by these names."""
    places = [(module, name) for module in modules for name in names if hasattr(module, name)]
    parts = [getattr(module, name) for module, name in places]
    whole = nnx.clone(parts[0])
    kernel = jnp.concatenate([part.kernel[...] for part in parts], axis=1)
    whole.kernel = nnx.Param(kernel, axes=("hidden", "projections"))
    start = 0
    for (module, name), part in zip(places, parts, strict=True):
        stop = start + part.kernel.shape[1]
        setattr(module, name, Part(whole, start, stop))
        start = stop
