"""Model FLOPs of an architecture, independent of the implementation.

They are defined by the model and its layers: `Hymba.flops`, `Attention.flops`, `SSM.flops`.
"""

import functools

from flax import nnx
from flax.traverse_util import flatten_dict

from hymba_jax.config import ComputeConfig, HymbaConfig
from hymba_jax.model.hymba import Hymba
from hymba_jax.model.trainable import TRAIN_ALL, Trainable


@functools.lru_cache
def forward_flops(config: HymbaConfig, length: int, *, predicted: int) -> float:
    """FLOPs of one sequence's forward pass, with logits at `predicted` positions."""
    return Hymba.abstract(config, ComputeConfig()).flops(length, predicted=predicted)


@functools.lru_cache
def head_flops(config: HymbaConfig, length: int) -> float:
    """Those of `forward_flops` that are not matmuls with parameters: attention and SSM."""
    return Hymba.abstract(config, ComputeConfig()).head_flops(length)


@functools.lru_cache
def training_flops(config: HymbaConfig, length: int, trainable: Trainable = TRAIN_ALL) -> float:
    """FLOPs of a sequence's loss and gradient: three forward passes, without recomputation.

    Less the gradients of frozen matrices, each of which is one of the three.
    """
    model = Hymba.abstract(config, ComputeConfig(), trainable.adapter)
    _, frozen = trainable.split(nnx.to_pure_dict(nnx.state(model)))
    output = "embedding" if config.tie_embeddings else "lm_head"
    omitted = sum(
        leaf.size
        for path, leaf in flatten_dict(frozen).items()
        if path[-1] == "kernel" or path[0] == output
    )
    return 3 * model.flops(length, predicted=length) - 2 * omitted * length
