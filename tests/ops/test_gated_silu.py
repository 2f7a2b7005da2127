"""The gate of an MLP against its formula in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hymba_jax.ops.gated_silu import gated_silu


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("bfloat16", 2e-2)])
def test_value_and_gradients(dtype, tolerance):
    """Relative to 1; a few roundings of 6e-8 and 4e-3."""
    rng = np.random.default_rng(0)
    gate, up, dy = (jnp.asarray(rng.normal(size=(2, 3, 5)), dtype) for _ in range(3))
    y, vjp = jax.vjp(gated_silu, gate, up)
    g, u, d = (np.asarray(v, np.float64) for v in (gate, up, dy))
    sigmoid = 1 / (1 + np.exp(-g))
    dgate = d * u * sigmoid * (1 + g * (1 - sigmoid))
    for actual, wanted in zip(
        (y, *vjp(dy)), (g * sigmoid * u, dgate, d * g * sigmoid), strict=True
    ):
        assert actual.dtype == dtype
        np.testing.assert_allclose(np.asarray(actual, np.float64), wanted, tolerance, tolerance)
