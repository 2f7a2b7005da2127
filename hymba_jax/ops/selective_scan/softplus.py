"""softplus at full float32 accuracy, also inside kernels."""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from numpy.polynomial import Chebyshev, Polynomial

from hymba_jax.types import Array

# A polynomial for log(1 + w) / w on [0, 1], with error 1e-8. Computing 1 + w would lose the digits
# of small w, and trained models have small time steps; the log1p of a TPU does that from w = 4e-4
# on, GPU kernels have none, and a CPU's takes 1.4 times as long for the whole scan.
_LOG1P = Chebyshev.interpolate(lambda w: np.log1p(w) / w, 9, [0, 1]).convert(kind=Polynomial).coef


def softplus(v: Array, exp: Callable[[Array], Array]) -> Array:
    """log(1 + exp(v)) in float32, with an `exp` for arguments up to zero; softplus(-inf) = 0."""
    w = exp(-jnp.abs(v))
    log1p = jnp.zeros_like(v)
    for coefficient in reversed(_LOG1P.tolist()):
        log1p = log1p * w + coefficient
    return jnp.maximum(v, 0) + log1p * w
