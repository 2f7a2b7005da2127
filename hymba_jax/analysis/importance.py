"""How much each layer's attention and SSM heads matter (Figs. 3 and 13)."""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from flax import nnx

from hymba_jax.model import Hymba, unstack_layers
from hymba_jax.model.mixer import HybridMixer
from hymba_jax.types import Float


def head_importance(
    model: Hymba, evaluate: Callable[[Hymba], float]
) -> tuple[float, Float[np.ndarray, "layers sides"]]:
    """An evaluation of the model, and of it without one side of one layer at a time.

    A side is taken away by a beta vector of zeros, so that the other one is what remains.

    Args:
      evaluate: any number, such as an accuracy or a loss; it must not change the model.

    Returns:
      The number of the whole model, and those without the attention and without the SSM heads of
      each layer; NaN in layers that do not have both.
    """
    model = unstack_layers(model)
    results = np.full((len(model.blocks()), 2), np.nan)
    for layer, block in enumerate(model.blocks()):
        if isinstance(block.mixer, HybridMixer):
            results[layer] = [evaluate(_without(model, layer, side)) for side in range(2)]
    return evaluate(model), results


def _without(model: Hymba, layer: int, side: int) -> Hymba:
    """A model that shares all other parameters."""
    copy = nnx.merge(*nnx.split(model))
    mixer = copy.blocks()[layer].mixer
    assert isinstance(mixer, HybridMixer)
    norm = mixer.ssm_norm if side else mixer.attention_norm
    # A new one, as the copy's modules are new, but their parameters are the model's own.
    norm.scale = nnx.Param(jnp.zeros_like(norm.scale[...]), **norm.scale.get_metadata())
    return copy
