"""The whole model against the HF implementation: values, hidden states, loss and every gradient.

Bounds are those of golden/README.md: a few times the distance between the HF implementation's own
float32 and float64 runs, and 8 times below what an eps of 1e-5 instead of 1e-6 would move.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from golden_cases import CASES, load, to_hf
from slow import slow_but

from hymba_jax.data import IGNORED_TARGET, Batch
from hymba_jax.training.loss import next_token_loss

VALUE_BOUND = 5e-4
GRADIENT_BOUND = 3e-4  # of the gradient's own maximum

load = functools.cache(load)
# Scanned layers behind meta tokens; shared keys and values. The others have the same kinds of
# layers, in other patterns and sizes.
QUICK = slow_but(CASES, "tiny-default-rope", "tiny-nometa")


def loss_and_logits(graph, params, tokens):
    model = nnx.merge(graph, params)
    targets = jnp.full_like(tokens, IGNORED_TARGET).at[:, :-1].set(tokens[:, 1:])
    return next_token_loss(model, Batch(tokens, targets))["loss"].mean, model(tokens)


@functools.cache
def step_of(case, **compute):
    """Compiled: loss, logits and gradients from parameters and tokens; and the parameters."""
    graph, params = load(case).model(**compute)
    loss = functools.partial(loss_and_logits, graph)
    return jax.jit(jax.value_and_grad(loss, has_aux=True)), params


def run(case, **compute):
    """Loss, logits and gradients under HF names."""
    golden = load(case)
    step, params = step_of(case, **compute)
    (loss, logits), gradients = step(params, golden.tokens)
    scan_layers = compute.get("scan_layers", True)
    return loss, logits, to_hf(gradients, golden.config, scan_layers=scan_layers)


reference_run = functools.cache(run)


def distance(gradients, expected):
    """The largest error of each gradient, as a part of its own maximum."""
    return {
        name: np.abs(gradients[name] - wanted).max() / np.abs(wanted).max()
        for name, wanted in expected.items()
    }


@functools.cache
def rounding_distance(case):
    """What one rounding does to the gradients: how far they are, at most, from those of weights
    that differ by one unit in the last place."""
    step, params = step_of(case)
    rng = np.random.default_rng(0)

    def neighbour(weights):
        towards = np.where(rng.random(weights.shape) < 0.5, np.inf, -np.inf)
        return jnp.asarray(np.nextafter(weights, towards.astype(np.float32)))

    golden = load(case)
    _, gradients = step(jax.tree.map(neighbour, params), golden.tokens)
    moved = to_hf(gradients, golden.config, scan_layers=True)
    return max(distance(moved, reference_run(case)[2]).values())


class TestHFImplementation:
    @pytest.mark.parametrize("case", QUICK)
    def test_logits_and_loss(self, case):
        golden = load(case)
        loss, logits, _ = reference_run(case)
        np.testing.assert_allclose(logits, golden.arrays["logits"], rtol=0, atol=VALUE_BOUND)
        np.testing.assert_allclose(loss, golden.meta["loss"], rtol=0, atol=VALUE_BOUND)

    # Scanned layers, and others before, between and behind them.
    @pytest.mark.parametrize("case", slow_but(CASES, "tiny-shared"))
    def test_hidden_states_after_each_layer(self, case):
        golden = load(case)
        graph, params = golden.model()
        forward = jax.jit(lambda p, t: [*nnx.merge(graph, p).hidden_states(t)])
        states = forward(params, golden.tokens)
        expected = golden.arrays["hidden_states"]
        assert len(states) == len(expected) == golden.config.num_layers + 1
        for actual, wanted in zip(states, expected, strict=True):
            np.testing.assert_allclose(actual, wanted, rtol=0, atol=VALUE_BOUND)

    @pytest.mark.parametrize("case", QUICK)
    def test_gradient_of_every_parameter(self, case):
        golden = load(case)
        _, _, gradients = reference_run(case)
        assert gradients.keys() == golden.gradients.keys()
        strides = golden.meta["grad_stride"] or {}
        for name, expected in golden.gradients.items():
            actual = np.asarray(gradients[name]).reshape(-1)[:: strides.get(name, 1)]
            error = np.abs(actual - expected.reshape(-1)).max() / np.abs(expected).max()
            assert error <= GRADIENT_BOUND, (name, error)


# tiny-default-rope has four stacked layers, tiny-shared two scanned pairs. By default there are
# gradients with and without remat in `test_sharding.py`, unrolled layers in `model/test_state.py`.
@pytest.mark.slow
@pytest.mark.parametrize("case", ["tiny-default-rope", "tiny-shared"])
@pytest.mark.parametrize(
    "compute",
    [
        {"scan_layers": False},
        {"remat": "block"},
        {"remat": "kernels"},
        {"remat": "dots"},
        {"remat": "activations"},
        {"scan_layers": False, "remat": "block"},
    ],
    ids=lambda compute: "-".join(f"{key}={value}" for key, value in compute.items()),
)
def test_compute_options_agree(case, compute):
    """To float32 rounding: they are the same sums in another order. Gradients differ by no more
    than those of weights rounded once, 9e-5 and 1.1e-5 of their maxima."""
    loss, logits, gradients = run(case, **compute)
    expected_loss, expected_logits, expected_gradients = reference_run(case)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-6)
    np.testing.assert_allclose(logits, expected_logits, rtol=0, atol=VALUE_BOUND / 10)
    bound = rounding_distance(case)
    errors = distance(gradients, expected_gradients)
    assert {name: error for name, error in errors.items() if error > bound} == {}


@pytest.mark.parametrize("scan_layers", slow_but([True, False], False))
def test_without_jit(scan_layers):
    golden = load("tiny-default-rope")
    graph, params = golden.model(scan_layers=scan_layers)
    logits = nnx.merge(graph, params)(golden.tokens)
    np.testing.assert_allclose(logits, golden.arrays["logits"], rtol=0, atol=VALUE_BOUND)


@pytest.mark.parametrize("case", slow_but(CASES, "tiny-default-rope"))
def test_bfloat16_compute(case):
    """No further off than twice what rounding the weights alone does to the float32 model.

    A bfloat16 keeps 8 bits, so a rounding moves a number by at most 2**-8 of itself. Computing in
    bfloat16 rounds each weight once and the activations about as often. The measure is the root
    mean square over all logits; the loss averages over tokens and errs less.
    """
    golden = load(case)
    step, params = step_of(case)
    rng = np.random.default_rng(0)
    moved = jax.tree.map(
        lambda w: w * (1 + rng.uniform(-(2**-8), 2**-8, w.shape).astype(np.float32)), params
    )
    (_, moved_logits), _ = step(moved, golden.tokens)
    graph, params = golden.model(dtype="bfloat16")
    loss, logits = jax.jit(functools.partial(loss_and_logits, graph))(params, golden.tokens)
    assert logits.dtype == jnp.float32
    expected = golden.arrays["logits"]
    error, bound = (np.sqrt(np.mean((a - expected) ** 2)) for a in (logits, moved_logits))
    assert error <= 2 * bound
    np.testing.assert_allclose(loss, golden.meta["loss"], rtol=0.02)
