"""Weights of a model far from where training starts, by NumPy: JAX would compile each shape's."""

import jax.numpy as jnp
import numpy as np
from flax import nnx

from hymba_jax.config import ComputeConfig, HymbaConfig
from hymba_jax.model import Hymba

# Of weights whose values are not about 0 where training starts.
CENTERS = {"scale": 1.0, "D": 1.0, "A_log": 1.0, "dt_bias": -4.6}


def random_weights(config: HymbaConfig, **compute: object) -> tuple[nnx.GraphDef, nnx.State]:
    """The structure and the parameters of a model in which every part of every layer matters."""
    graph, abstract = nnx.split(Hymba.abstract(config, ComputeConfig(**compute)))
    rng, flat = np.random.default_rng(1), []
    for path, weight in nnx.to_flat_state(abstract):
        values = CENTERS.get(path[-1], 0.0) + 0.4 * rng.normal(size=weight.shape)
        flat.append((path, weight.replace(jnp.asarray(values, weight.dtype))))
    return graph, nnx.from_flat_state(flat)
