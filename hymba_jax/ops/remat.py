"""Names of results that rematerialization may keep (`compute.remat`).

An op with a gradient of its own names its outputs and what else its backward pass needs of the
forward pass, such as the states between chunks: where these are kept, it is not run again.
"""

import jax
from jax.ad_checkpoint import checkpoint_name

MATMUL, ATTENTION, SCAN, NORM = "matmul", "attention", "selective_scan", "norm"
ACTIVATION = "activation"  # what lies between matmuls, and is cheap to compute


def named[T](name: str, results: T) -> T:
    """The same arrays, under the name by which a policy keeps them."""
    return jax.tree.map(lambda array: checkpoint_name(array, name), results)
