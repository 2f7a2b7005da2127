"""How much arithmetic an architecture needs, whatever an implementation does.

What counts is defined by the model and its layers: `Hymba.flops`, `Attention.flops`, `SSM.flops`.
"""

import functools

from hymba_jax.config import ComputeConfig, HymbaConfig
from hymba_jax.model.hymba import Hymba


@functools.lru_cache
def forward_flops(config: HymbaConfig, length: int, *, predicted: int) -> float:
    """FLOPs of one sequence's forward pass, of which `predicted` positions have logits."""
    return Hymba.abstract(config, ComputeConfig()).flops(length, predicted=predicted)


@functools.lru_cache
def head_flops(config: HymbaConfig, length: int) -> float:
    """Those of them that are no matmuls with parameters: attention's and the SSM's own."""
    return Hymba.abstract(config, ComputeConfig()).head_flops(length)


def training_flops(config: HymbaConfig, length: int) -> float:
    """Of a sequence's loss and gradient: three times the forward pass, nothing computed twice."""
    return 3 * forward_flops(config, length, predicted=length)
