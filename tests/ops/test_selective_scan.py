"""Every implementation of the selective scan against the recurrence in numpy, float64."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hymba_jax.ops.selective_scan import selective_scan
from hymba_jax.ops.selective_scan.api import IMPLEMENTATIONS

OPTIONAL = ("D", "z", "dt_bias", "initial_state")
# Float32 rounds at 6e-8; sums of some hundred terms, relative to the largest entry.
FLOAT32 = 1e-5

every_implementation = pytest.mark.parametrize("implementation", sorted(IMPLEMENTATIONS))


def make_inputs(batch, length, channels, state, without=()):
    rng = np.random.default_rng(length)
    inputs = {
        "x": rng.normal(size=(batch, length, channels)),
        "dt": rng.normal(size=(batch, length, channels)) - 1,
        "A": -np.exp(rng.normal(size=(state, channels))),
        "B": rng.normal(size=(batch, length, state)),
        "C": rng.normal(size=(batch, length, state)),
        "D": rng.normal(size=channels),
        "z": rng.normal(size=(batch, length, channels)),
        "dt_bias": rng.normal(size=channels),
        "initial_state": rng.normal(size=(batch, state, channels)),
    }
    # Values that float32 holds exactly, so that only the arithmetic differs.
    return {k: v.astype(np.float32) for k, v in inputs.items() if k not in without}


def oracle(x, dt, A, B, C, D=None, z=None, dt_bias=None, initial_state=None):
    """The formula, one number at a time over time, in float64."""
    delta = np.logaddexp(0, dt + (0 if dt_bias is None else dt_bias))
    h = np.zeros((len(x), *A.shape)) if initial_state is None else initial_state
    y = np.zeros_like(x)
    for t in range(x.shape[1]):
        decay = np.exp(delta[:, t, None, :] * A)
        h = decay * h + (delta[:, t] * x[:, t])[:, None, :] * B[:, t, :, None]
        y[:, t] = (h * C[:, t, :, None]).sum(1)
    if D is not None:
        y = y + D * x
    if z is not None:
        y = y * z / (1 + np.exp(-z))
    return y, h


def float64(inputs):
    return {k: np.asarray(v, np.float64) for k, v in inputs.items()}


def device(inputs, dtype=jnp.float32):
    return {k: jnp.asarray(v, dtype) for k, v in inputs.items()}


def loss_of(scan, weights):
    """A scalar that gives y and the final state different cotangents everywhere."""

    def loss(inputs):
        return sum((w * out).sum() for w, out in zip(weights, scan(**inputs), strict=True))

    return loss


def make_weights(batch, length, channels, state):
    rng = np.random.default_rng(1)
    shapes = (batch, length, channels), (batch, state, channels)
    return [rng.normal(size=s).astype(np.float32) for s in shapes]


def gradients_in_float64(inputs, weights):
    """The reference implementation differentiated in float64: see `test_exact_gradients`."""
    with jax.enable_x64(True):
        loss = loss_of(IMPLEMENTATIONS["reference"], [jnp.asarray(w, jnp.float64) for w in weights])
        return jax.tree.map(np.asarray, jax.jit(jax.grad(loss))(device(inputs, jnp.float64)))


@cache
def exact_gradients(sizes, without=()):
    return gradients_in_float64(make_inputs(*sizes, without), make_weights(*sizes))


def assert_close(actual, expected, relative=0.0, of_largest=FLOAT32):
    expected = np.asarray(expected)
    atol = of_largest * np.abs(expected).max()
    np.testing.assert_allclose(np.asarray(actual, np.float64), expected, rtol=relative, atol=atol)


@pytest.mark.parametrize("name", sorted(make_inputs(1, 1, 1, 1)))
def test_exact_gradients(name):
    """Float64 gradients equal central differences of the numpy oracle, entry by entry."""
    sizes = (2, 3, 3, 2)
    inputs, weights = float64(make_inputs(*sizes)), make_weights(*sizes)
    gradient = exact_gradients(sizes)[name]
    loss, step = loss_of(oracle, weights), 1e-6
    for index in np.ndindex(inputs[name].shape):
        values = []
        for sign in (1, -1):
            moved = inputs[name].copy()
            moved[index] += sign * step
            values.append(loss(inputs | {name: moved}))
        difference = (values[0] - values[1]) / (2 * step)
        assert gradient[index] == pytest.approx(difference, rel=1e-6, abs=1e-8)


# Lengths around a chunk of 8: one position, part of one, exactly one and two, two and a part.
@every_implementation
@pytest.mark.parametrize(
    ("length", "channels"), [(1, 5), (5, 5), (8, 5), (16, 5), (19, 5), (19, 130)]
)
def test_forward_and_gradients(implementation, length, channels):
    sizes = (2, length, channels, 4)
    inputs, weights = make_inputs(*sizes), make_weights(*sizes)

    def scan(**inputs):
        return selective_scan(**inputs, implementation=implementation)

    y, final_state = jax.jit(scan)(**device(inputs))
    expected_y, expected_state = oracle(**float64(inputs))
    assert_close(y, expected_y)
    assert_close(final_state, expected_state)

    gradients = jax.jit(jax.grad(loss_of(scan, weights)))(device(inputs))
    for name, expected in exact_gradients(sizes).items():
        assert_close(gradients[name], expected)


@every_implementation
@pytest.mark.parametrize("without", [OPTIONAL[:2], OPTIONAL[2:], OPTIONAL])
def test_optional_inputs(implementation, without):
    sizes = (2, 11, 6, 3)
    inputs, weights = make_inputs(*sizes, without), make_weights(*sizes)

    def scan(**inputs):
        return selective_scan(**inputs, implementation=implementation)

    for actual, expected in zip(
        jax.jit(scan)(**device(inputs)), oracle(**float64(inputs)), strict=True
    ):
        assert_close(actual, expected)
    gradients = jax.jit(jax.grad(loss_of(scan, weights)))(device(inputs))
    for name, expected in exact_gradients(sizes, without).items():
        assert_close(gradients[name], expected)


@every_implementation
def test_bfloat16(implementation):
    """Arithmetic in float32, so the only error beyond it is the rounding of each result to
    8 bits, 2**-9 of its size; a bound of 2**-8 leaves a result on the edge its neighbour."""
    sizes = (2, 19, 6, 4)
    halved = ("x", "dt", "B", "C", "z")
    inputs, weights = make_inputs(*sizes), make_weights(*sizes)
    low = {
        k: jnp.asarray(v, jnp.bfloat16 if k in halved else jnp.float32) for k, v in inputs.items()
    }
    # y's cotangent is rounded on its way in: give it a value that bfloat16 holds.
    weights[0] = np.asarray(jnp.asarray(weights[0], jnp.bfloat16), np.float32)

    def scan(**inputs):
        y, state = selective_scan(**inputs, implementation=implementation)
        assert y.dtype == jnp.bfloat16
        assert state.dtype == jnp.float32
        return y, state

    def loss(inputs):
        y, state = scan(**inputs)
        return (weights[0] * y.astype(jnp.float32)).sum() + (weights[1] * state).sum()

    y, final_state = jax.jit(scan)(**low)
    expected_y, expected_state = oracle(**float64(low))
    assert_close(y, expected_y, relative=2**-8)
    assert_close(final_state, expected_state)

    exact = gradients_in_float64(float64(low), weights)
    for name, gradient in jax.jit(jax.grad(loss))(low).items():
        assert gradient.dtype == low[name].dtype
        assert_close(gradient, exact[name], relative=2**-8 if name in halved else 0)


@every_implementation
@pytest.mark.parametrize("cut", [1, 8, 13])
def test_two_halves_equal_the_whole(implementation, cut):
    inputs = device(make_inputs(2, 19, 6, 4))
    sequences = ("x", "dt", "B", "C", "z")
    first = inputs | {k: inputs[k][:, :cut] for k in sequences}
    second = inputs | {k: inputs[k][:, cut:] for k in sequences}

    y, final_state = selective_scan(**inputs, implementation=implementation)
    y1, state = selective_scan(**first, implementation=implementation)
    y2, last = selective_scan(**second | {"initial_state": state}, implementation=implementation)
    assert_close(jnp.concatenate([y1, y2], axis=1), y)
    assert_close(last, final_state)


@every_implementation
def test_transformations(implementation):
    """vmap, and rematerialised inside a scan over layers: the same values and gradients."""
    sizes = (2, 11, 6, 3)
    inputs, weights = make_inputs(*sizes), make_weights(*sizes)
    layers = [device(inputs), jax.tree.map(lambda v: v * 0.5, device(inputs))]
    stacked = jax.tree.map(lambda *v: jnp.stack(v), *layers)

    def scan(**inputs):
        return selective_scan(**inputs, implementation=implementation)

    loss = loss_of(scan, weights)
    separate = [jax.jit(jax.value_and_grad(loss))(layer) for layer in layers]
    expected = jax.tree.map(lambda *v: np.stack(v), *separate)

    def summed(stacked):
        step = jax.checkpoint(lambda total, layer: (total + loss(layer), loss(layer)))
        return jax.lax.scan(step, jnp.zeros(()), stacked)

    (_, losses), gradients = jax.jit(jax.value_and_grad(summed, has_aux=True))(stacked)
    vmapped = jax.jit(jax.vmap(jax.value_and_grad(loss)))(stacked)
    for actual in (vmapped, (losses, gradients)):
        jax.tree.map(assert_close, actual, expected)


def test_padding_decays_nothing():
    """A time step of zero keeps the state to the last bit, however often it is taken."""
    inputs = device(make_inputs(1, 19, 6, 4, without=("dt_bias",)))
    inputs["dt"] = jnp.full_like(inputs["dt"], -jnp.inf)
    for implementation in IMPLEMENTATIONS:
        _, final_state = selective_scan(**inputs, implementation=implementation)
        np.testing.assert_array_equal(final_state, inputs["initial_state"])


def test_fast_decay_underflows_to_zero():
    """exp(delta A) far below the smallest float32 forgets the state and gives no NaN."""
    inputs = device(make_inputs(1, 9, 6, 4))
    inputs["A"] = jnp.full_like(inputs["A"], -1e6)
    for implementation in IMPLEMENTATIONS:
        scan = loss_of(
            lambda i=implementation, **v: selective_scan(**v, implementation=i),
            make_weights(1, 9, 6, 4),
        )
        gradients = jax.jit(jax.grad(scan))(inputs)
        assert_close(gradients["initial_state"], np.zeros((1, 4, 6)))
        assert all(jnp.isfinite(g).all() for g in gradients.values())


def test_unknown_implementation():
    inputs = device(make_inputs(1, 2, 3, 2))
    with pytest.raises(ValueError, match=r"unknown .*'cuda'; choose from .*'reference', 'xla'"):
        selective_scan(**inputs, implementation="cuda")
