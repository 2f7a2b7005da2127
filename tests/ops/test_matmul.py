"""`matmul` and its custom gradient, against numpy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hymba_jax.ops.matmul import matmul, matmul_transposed


def arrays(leading, features=5, outputs=7):
    rng = np.random.default_rng(0)
    return [
        rng.normal(size=shape)
        for shape in ((*leading, features), (features, outputs), (*leading, outputs))
    ]


@pytest.mark.parametrize("leading", [(), (3,), (2, 3), (2, 3, 4)])
def test_values_and_gradients(leading):
    x, kernel, dy = arrays(leading)
    y, pull = jax.vjp(matmul, *(jnp.asarray(a, jnp.float32) for a in (x, kernel)))
    dx, dkernel = pull(jnp.asarray(dy, jnp.float32))
    np.testing.assert_allclose(y, x @ kernel, rtol=0, atol=1e-5)
    np.testing.assert_allclose(dx, dy @ kernel.T, rtol=0, atol=1e-5)
    expected = x.reshape(-1, 5).T @ dy.reshape(-1, 7)
    np.testing.assert_allclose(dkernel, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("length", [1, 3])
def test_a_transposed_kernel(length):
    """In float32 out of bfloat16, for one position, which is computed the other way, and more."""
    x, kernel, dy = (jnp.asarray(a, jnp.bfloat16) for a in arrays((2, length)))
    y, pull = jax.vjp(lambda *a: matmul_transposed(*a, jnp.float32), x, kernel.T)
    exact = np.asarray(x, np.float64) @ np.asarray(kernel, np.float64)
    np.testing.assert_allclose(y, exact, rtol=0, atol=1e-5)
    _, plain = jax.vjp(lambda *a: matmul(*a, jnp.float32), x, kernel)
    (dx, dkernel), (expected_dx, expected_dkernel) = (
        f(dy.astype(jnp.float32)) for f in (pull, plain)
    )
    np.testing.assert_array_equal(dx, expected_dx)
    np.testing.assert_array_equal(dkernel, expected_dkernel.T)


def test_float32_out_of_bfloat16():
    """Each product of two 8-bit numbers is exact in float32, and so nearly is their sum."""
    x, kernel, dy = (jnp.asarray(a, jnp.bfloat16) for a in arrays((2, 3)))
    y, pull = jax.vjp(lambda x, kernel: matmul(x, kernel, jnp.float32), x, kernel)
    assert y.dtype == jnp.float32
    exact = np.asarray(x, np.float64) @ np.asarray(kernel, np.float64)
    np.testing.assert_allclose(y, exact, rtol=0, atol=1e-5)
    assert [gradient.dtype for gradient in pull(dy.astype(jnp.float32))] == [jnp.bfloat16] * 2


@pytest.mark.parametrize("leading", [(), (1,), (1, 1), (2,)])
@pytest.mark.parametrize("features", [16, 12])
def test_a_row_of_bfloat16(leading, features):
    """On CPUs it is a loop, if features come in eights; its gradients are the usual ones."""
    x, kernel, dy = (jnp.asarray(a, jnp.bfloat16) for a in arrays(leading, features))
    exact = np.asarray(x, np.float64) @ np.asarray(kernel, np.float64)
    y, pull = jax.vjp(matmul, x, kernel)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(y, np.float64), exact, rtol=2**-8, atol=1e-5)
    y = jax.jit(lambda x, kernel: matmul(x, kernel, jnp.float32))(x, kernel)
    np.testing.assert_allclose(y, exact, rtol=0, atol=1e-5)
    dx, dkernel = (np.asarray(gradient, np.float64) for gradient in pull(dy))
    x, kernel, dy = (np.asarray(a, np.float64) for a in (x, kernel, dy))
    np.testing.assert_allclose(dx, dy @ kernel.T, rtol=2**-8, atol=1e-2)
    expected = x.reshape(-1, features).T @ dy.reshape(-1, 7)
    np.testing.assert_allclose(dkernel, expected, rtol=2**-8, atol=1e-2)


def test_under_vmap_and_remat():
    x, kernel, _ = (jnp.asarray(a, jnp.float32) for a in arrays((2, 3)))
    kernels = jnp.stack([kernel, 2 * kernel])

    def loss(x, kernel):
        return jnp.sum(jnp.square(jax.checkpoint(matmul)(x, kernel)))

    both = jax.vmap(jax.grad(loss, argnums=(0, 1)), in_axes=(None, 0))(x, kernels)
    for i in range(2):
        for batched, alone in zip(both, jax.grad(loss, (0, 1))(x, kernels[i]), strict=True):
            np.testing.assert_allclose(batched[i], alone, rtol=1e-5)


@pytest.mark.parametrize("shape", [(1, 1, 6), (6,)])
def test_one_row_on_a_gpu(monkeypatch, shape):
    """Is a matmul there, too, of the same result and gradients."""
    rng = np.random.default_rng(0)
    x, kernel = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in (shape, (6, 4)))

    def loss(x, kernel):
        return (matmul(x, kernel) ** 2).sum()

    monkeypatch.setattr("hymba_jax.ops.matmul.target_platform", lambda: "gpu")
    y = matmul(x, kernel)
    assert y.shape == (*shape[:-1], 4)
    exact = np.float64(x) @ np.float64(kernel)
    np.testing.assert_allclose(y, exact, rtol=1e-6, atol=1e-6)
    of_x, of_kernel = jax.grad(loss, argnums=(0, 1))(x, kernel)
    np.testing.assert_allclose(of_x, 2 * exact @ np.float64(kernel).T, rtol=1e-5, atol=1e-5)
    outer = np.outer(np.float64(x), 2 * exact)
    np.testing.assert_allclose(of_kernel, outer, rtol=1e-5, atol=1e-5)
    assert "2x6xf32" in jax.jit(matmul).lower(x, kernel).as_text()
