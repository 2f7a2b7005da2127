"""Every attention back end against a loop over queries in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hymba_jax.ops.attention import IMPLEMENTATIONS, attention
from hymba_jax.ops.attention.reference import attention_mask

BATCH, HEADS, KV_HEADS, HEAD_DIM, VALUE_DIM = 2, 6, 2, 8, 12


def inputs(length, seed=0):
    rng = np.random.default_rng(seed)
    shapes = [(HEADS, HEAD_DIM), (KV_HEADS, HEAD_DIM), (KV_HEADS, VALUE_DIM)]
    return [rng.normal(size=(BATCH, length, *shape)) for shape in shapes]


def by_hand(query, key, value, window, num_meta_tokens):
    """One query, one head at a time, from the mask's words."""
    output = np.zeros((*query.shape[:3], value.shape[-1]))
    for b, q, h in np.ndindex(query.shape[:3]):
        group = h // (query.shape[2] // key.shape[2])
        seen = [k for k in range(q + 1) if window is None or q - k <= window or k < num_meta_tokens]
        scores = key[b, seen, group] @ query[b, q, h] / np.sqrt(query.shape[-1])
        weights = np.exp(scores - scores.max())
        output[b, q, h] = weights @ value[b, seen, group] / weights.sum()
    return output


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("length", "window", "meta"), [(1, None, 0), (23, None, 3), (23, 4, 3), (23, 4, 0), (9, 30, 2)]
)
class TestEveryImplementation:
    def test_values(self, implementation, length, window, meta):
        arrays = inputs(length)
        ours = attention(
            *(jnp.asarray(a, jnp.float32) for a in arrays),
            window=window,
            num_meta_tokens=meta,
            implementation=implementation,
        )
        np.testing.assert_allclose(ours, by_hand(*arrays, window, meta), rtol=0, atol=2e-6)

    def test_gradients(self, implementation, length, window, meta):
        """Along a random direction, against central differences of the loop in float64."""
        arrays, directions = inputs(length), inputs(length, seed=1)
        cotangent = np.random.default_rng(2).normal(size=(BATCH, length, HEADS, VALUE_DIM))

        def loss(query, key, value):
            output = attention(
                query,
                key,
                value,
                window=window,
                num_meta_tokens=meta,
                implementation=implementation,
            )
            return jnp.sum(output * cotangent)

        gradients = jax.grad(loss, argnums=(0, 1, 2))(
            *(jnp.asarray(a, jnp.float32) for a in arrays)
        )
        step = 1e-5
        for i, direction in enumerate(directions):
            shifted = [
                [a + sign * step * direction if i == j else a for j, a in enumerate(arrays)]
                for sign in (1, -1)
            ]
            plus, minus = (np.sum(by_hand(*a, window, meta) * cotangent) for a in shifted)
            expected = (plus - minus) / (2 * step)
            ours = np.sum(np.asarray(gradients[i], np.float64) * direction)
            scale = np.linalg.norm(gradients[i]) * np.linalg.norm(direction)
            assert abs(ours - expected) <= 1e-5 * max(scale, 1)

    def test_bfloat16(self, implementation, length, window, meta):
        """Weights and values are rounded to 8 bits, their products summed in more: 2 * 2**-8."""
        arrays = [jnp.asarray(a, jnp.bfloat16) for a in inputs(length)]
        ours = attention(
            *arrays, window=window, num_meta_tokens=meta, implementation=implementation
        )
        assert ours.dtype == jnp.bfloat16
        expected = by_hand(*(np.asarray(a, np.float64) for a in arrays), window, meta)
        bound = 2 * 2**-8 * np.abs(arrays[2].astype(jnp.float32)).max()
        np.testing.assert_allclose(ours.astype(jnp.float32), expected, rtol=0, atol=bound)


def test_the_mask_counts_absolute_positions():
    """A piece of the queries sees what it would see among all of them."""
    everything = jnp.arange(40)
    whole = attention_mask(everything[None], everything, window=5, num_meta_tokens=3)
    piece = attention_mask(everything[None, 30:], everything[:35], window=5, num_meta_tokens=3)
    np.testing.assert_array_equal(piece, whole[:, 30:, :35])
    assert whole[0, 30].nonzero()[0].tolist() == [0, 1, 2, *range(25, 31)]


def test_an_unknown_implementation_is_refused():
    arrays = [jnp.asarray(a, jnp.float32) for a in inputs(3)]
    with pytest.raises(ValueError, match="no attention 'fastest'; there are reference"):
        attention(*arrays, window=None, num_meta_tokens=0, implementation="fastest")
