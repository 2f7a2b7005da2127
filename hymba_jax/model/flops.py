"""Model FLOPs of an architecture, independent of the implementation.

They are defined by the model and its layers: `Hymba.flops`, `Attention.flops`, `SSM.flops`.
"""

import functools

from hymba_jax.config import ComputeConfig, HymbaConfig
from hymba_jax.model.hymba import Hymba


@functools.lru_cache
def forward_flops(config: HymbaConfig, length: int, *, predicted: int) -> float:
    """FLOPs of one sequence's forward pass, with logits at `predicted` positions."""
    return Hymba.abstract(config, ComputeConfig()).flops(length, predicted=predicted)


@functools.lru_cache
def head_flops(config: HymbaConfig, length: int) -> float:
    """Those of `forward_flops` that are not matmuls with parameters: attention and SSM."""
    return Hymba.abstract(config, ComputeConfig()).head_flops(length)


def training_flops(config: HymbaConfig, length: int) -> float:
    """FLOPs of a sequence's loss and gradient: three forward passes, without recomputation."""
    return 3 * forward_flops(config, length, predicted=length)
