"""NumPy arrays: memory layout and bits."""

import jax
import numpy as np


def contiguous(array: np.ndarray) -> np.ndarray:
    """The same array in C order. JAX transposes about 5 times as fast as NumPy."""
    if array.flags.c_contiguous:
        return array
    return np.asarray(jax.device_put(array, jax.local_devices(backend="cpu")[0]))


def bits(array: np.ndarray) -> np.ndarray:
    """A view as unsigned integers, in which NaN equals itself."""
    return array.view(np.dtype(f"u{array.itemsize}"))


def count_not_finite(array: np.ndarray) -> int:
    """How many numbers are NaN or infinite."""
    # Without the sign, the bits of both are those of infinity or above. np.isfinite alone takes
    # 4 times as long in bfloat16.
    if (bits(array) << 1).max(initial=0) < bits(np.array(np.inf, array.dtype)) << 1:
        return 0
    return int(np.count_nonzero(~np.isfinite(array)))
