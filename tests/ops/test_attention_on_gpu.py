"""Attention's kernels on a GPU, at the sizes of the family, against `reference` in float32."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hymba_jax.ops.attention.cudnn import cudnn
from hymba_jax.ops.attention.pallas_gpu import pallas_gpu
from hymba_jax.ops.attention.reference import reference
from hymba_jax.ops.platform import target_platform

pytestmark = pytest.mark.skipif(
    not target_platform().endswith("gpu"), reason="they run on NVIDIA GPUs only"
)
HEAD_DIM, VALUE_DIM = 64, 128
# Relative to the largest entry: bfloat16 rounds weights, values and results at 4e-3.
TOLERANCE = 1e-2


@pytest.mark.parametrize("implementation", [cudnn, pallas_gpu])
@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 4), (25, 5)])
@pytest.mark.parametrize(
    ("length", "window", "meta"),
    [(1000, None, 128), (1152, 1024, 128), (2176, 1024, 128), (900, 256, 128), (303, 40, 6)],
)
def test_values_and_gradients(implementation, heads, kv_heads, length, window, meta):
    """Lengths that fit into the window and that do not, which windows divide and do not."""
    if implementation is pallas_gpu and target_platform() != "gpu":
        pytest.skip("its matrix instructions are Hopper's")
    rng = np.random.default_rng(length)
    shapes = [(heads, HEAD_DIM), (kv_heads, HEAD_DIM), (kv_heads, VALUE_DIM), (heads, VALUE_DIM)]
    lengths = [length, meta + length, meta + length, length]
    arrays = [
        jnp.asarray(rng.normal(size=(2, n, *s)), jnp.bfloat16)
        for n, s in zip(lengths, shapes, strict=True)
    ]

    @partial(jax.jit, static_argnums=0)
    def run(attention, *arrays):
        *arrays, cotangent = arrays
        attention = partial(attention, window=window, num_meta_tokens=meta)
        output, vjp = jax.vjp(attention, *arrays)
        return output, *vjp(cotangent)

    expected = run(reference, *(a.astype(jnp.float32) for a in arrays))
    for actual, wanted in zip(run(implementation, *arrays), expected, strict=True):
        assert actual.dtype == jnp.bfloat16
        error = jnp.abs(actual.astype(jnp.float32) - wanted).max() / jnp.abs(wanted).max()
        assert error < TOLERANCE
