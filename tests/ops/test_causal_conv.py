"""The causal convolution against its formula in numpy, float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hymba_jax.ops.causal_conv import causal_conv

# Float32 rounds at 6e-8; sums of at most some hundred terms, relative to the largest entry.
FLOAT32 = 1e-5


def make_inputs(length, kernel, batch=2, channels=5):
    rng = np.random.default_rng(length)
    return {
        "x": rng.normal(size=(batch, length, channels)).astype(np.float32),
        "weight": rng.normal(size=(kernel, channels)).astype(np.float32),
        "bias": rng.normal(size=channels).astype(np.float32),
        "initial_inputs": rng.normal(size=(batch, kernel - 1, channels)).astype(np.float32),
    }


def oracle(x, weight, bias, initial_inputs):
    """The formula in float64, one position and tap at a time."""
    kernel, before = len(weight), initial_inputs.shape[1]
    y = np.zeros(x.shape)
    for t in range(x.shape[1]):
        for tap in range(kernel):
            s = t - (kernel - 1) + tap
            source = x[:, s] if s >= 0 else initial_inputs[:, before + s]
            y[:, t] += weight[tap].astype(np.float64) * source
    return y + bias


def device(inputs):
    return {k: jnp.asarray(v) for k, v in inputs.items()}


def assert_close(actual, expected, relative=0.0):
    atol = FLOAT32 * np.abs(expected).max()
    np.testing.assert_allclose(np.asarray(actual, np.float64), expected, rtol=relative, atol=atol)


@pytest.mark.parametrize("length", [1, 2, 3, 4, 11])
@pytest.mark.parametrize("kernel", [1, 2, 4])
def test_forward(length, kernel):
    inputs = make_inputs(length, kernel)
    y, final_inputs = jax.jit(causal_conv)(**device(inputs))
    assert_close(y, oracle(**inputs))
    seen = np.concatenate([inputs["initial_inputs"], inputs["x"]], axis=1)
    np.testing.assert_array_equal(final_inputs, seen[:, length:])


def test_zeros_left_of_the_start():
    inputs = make_inputs(6, 4)
    zeros = np.zeros_like(inputs.pop("initial_inputs"))
    y, final_inputs = causal_conv(**device(inputs))
    assert_close(y, oracle(**inputs, initial_inputs=zeros))
    np.testing.assert_array_equal(final_inputs, inputs["x"][:, -3:])


@pytest.mark.parametrize("cut", [1, 2, 7])
def test_two_halves_equal_the_whole(cut):
    inputs = device(make_inputs(11, 4))
    x = inputs.pop("x")
    y, final_inputs = causal_conv(x, **inputs)
    y1, between = causal_conv(x[:, :cut], **inputs)
    y2, last = causal_conv(x[:, cut:], **inputs | {"initial_inputs": between})
    np.testing.assert_array_equal(jnp.concatenate([y1, y2], axis=1), y)
    np.testing.assert_array_equal(last, final_inputs)


def test_gradients():
    """y is linear in each input apart, so a difference of any step is the exact derivative."""
    inputs = make_inputs(5, 4)
    cotangent = np.random.default_rng(1).normal(size=inputs["x"].shape).astype(np.float32)

    def loss(inputs):
        return (cotangent * causal_conv(**inputs)[0]).sum()

    gradients = jax.grad(loss)(device(inputs))
    at_zero = (cotangent * oracle(**inputs)).sum()
    for name, gradient in gradients.items():
        expected = np.zeros(gradient.shape)
        for index in np.ndindex(gradient.shape):
            moved = inputs[name].astype(np.float64)
            moved[index] += 1
            expected[index] = (cotangent * oracle(**inputs | {name: moved})).sum() - at_zero
        assert_close(gradient, expected)


def test_bfloat16():
    """Inputs and taps in bfloat16; y is rounded once, to 8 bits: at most 2**-8 of its size."""
    inputs = {k: jnp.asarray(v, jnp.bfloat16) for k, v in make_inputs(11, 4).items()}
    y, final_inputs = causal_conv(**inputs)
    assert y.dtype == final_inputs.dtype == jnp.bfloat16
    assert_close(y, oracle(**{k: np.asarray(v, np.float64) for k, v in inputs.items()}), 2**-8)


def test_vmap():
    inputs = {k: jnp.stack([v, 2 * v]) for k, v in make_inputs(5, 4).items()}
    mapped = jax.vmap(lambda v: causal_conv(**v))(inputs)
    for i in range(2):
        alone = causal_conv(**{k: v[i] for k, v in inputs.items()})
        jax.tree.map(lambda m, a, i=i: np.testing.assert_array_equal(m[i], a), mapped, alone)
