"""How much arithmetic an architecture needs, whatever an implementation does.

What counts is defined by the model and its layers: `Hymba.flops`, `Attention.flops`, `SSM.flops`.
"""

import functools

from flax import nnx

from hymba_jax.config import ComputeConfig, HymbaConfig
from hymba_jax.model.hymba import Hymba


@functools.lru_cache
def forward_flops(config: HymbaConfig, length: int, *, predicted: int) -> float:
    """FLOPs of one sequence's forward pass, of which `predicted` positions have logits."""
    return _abstract(config).flops(length, predicted=predicted)


@functools.lru_cache
def head_flops(config: HymbaConfig, length: int) -> float:
    """Those of them that are no matmuls with parameters: attention's and the SSM's own."""
    return _abstract(config).head_flops(length)


def training_flops(config: HymbaConfig, length: int) -> float:
    """Of a sequence's loss and gradient: three times the forward pass, nothing computed twice."""
    return 3 * forward_flops(config, length, predicted=length)


def _abstract(config: HymbaConfig) -> Hymba:
    return nnx.eval_shape(lambda: Hymba(config, ComputeConfig(), nnx.Rngs(0)))
