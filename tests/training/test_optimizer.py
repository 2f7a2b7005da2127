import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from training.tiny import COMPUTE, MODEL

from hymba_jax.config.training import TrainingConfig
from hymba_jax.model import Hymba
from hymba_jax.training.optimizer import (
    applied_learning_rate,
    is_matrix,
    make_optimizer,
)

CONFIG = TrainingConfig(
    steps=10,
    learning_rate=0.1,
    min_learning_rate=0.01,
    warmup_fraction=0.3,
    decay_fraction=0.4,
    weight_decay=0.2,
    clip_norm=1.0,
)


def optimizer_of(config):
    return make_optimizer(config)


def wsd(update: int) -> float:
    """The rate of update 1, 2, ..., 10, written out for the config above."""
    rates = [0.1 / 3, 0.2 / 3, 0.1, 0.1, 0.1, 0.1, 0.0775, 0.055, 0.0325, 0.01]
    return rates[update - 1]


def test_updates_equal_adamw_by_hand():
    """Decoupled decay, bias correction and clipping, in float64 (arXiv 1711.05101, algorithm 2)."""
    rng = np.random.default_rng(0)
    params = {"kernel": rng.normal(size=(3, 4)), "scale": rng.normal(size=4)}
    mean = {name: np.zeros_like(value) for name, value in params.items()}
    square = {name: np.zeros_like(value) for name, value in params.items()}
    optimizer = optimizer_of(CONFIG)
    actual = jax.tree.map(lambda value: jnp.asarray(value, jnp.float32), params)
    state = optimizer.init(actual)
    for update in range(1, 11):
        scale = 10.0 if update % 2 else 0.01  # clipped, and not
        grads = {name: scale * rng.normal(size=value.shape) for name, value in params.items()}
        updates, state = optimizer.update(
            jax.tree.map(lambda grad: jnp.asarray(grad, jnp.float32), grads), state, actual
        )
        actual = jax.tree.map(jnp.add, actual, updates)

        norm = np.sqrt(sum(np.sum(grad**2) for grad in grads.values()))
        for name, grad in grads.items():
            clipped = grad / max(norm, 1.0)
            mean[name] = 0.9 * mean[name] + 0.1 * clipped
            square[name] = 0.95 * square[name] + 0.05 * clipped**2
            step = mean[name] / (1 - 0.9**update)
            step /= np.sqrt(square[name] / (1 - 0.95**update)) + 1e-8
            if name == "kernel":
                step += 0.2 * params[name]
            params[name] = params[name] - wsd(update) * step
    for name, value in params.items():
        np.testing.assert_allclose(actual[name], value, rtol=1e-4, atol=1e-6)  # float32, ten steps


def test_muon_orthogonalizes_each_matrix_of_a_stack():
    """Singular vectors are those of the momentum with Nesterov's step; five Newton-Schulz steps
    bring singular values into 0.68 to 1.14 (Jordan, 2024). Whatever Muon leaves is AdamW's."""
    rng = np.random.default_rng(0)
    shapes = {"kernel": (2, 3, 5), "embedding": (6, 5), "lm_head": {"kernel": (5, 6)}}
    is_shape = lambda value: type(value) is tuple  # noqa: E731
    params = jax.tree.map(
        lambda shape: jnp.asarray(rng.normal(size=shape), jnp.float32), shapes, is_leaf=is_shape
    )
    config = dataclasses.replace(CONFIG, weight_decay=0.0, warmup_fraction=0.0, clip_norm=1e6)
    optimizers = [
        optimizer_of(config),
        optimizer_of(dataclasses.replace(config, optimizer="muon", muon_momentum=0.8)),
    ]
    states, momentum = [optimizer.init(params) for optimizer in optimizers], np.zeros((2, 3, 5))
    for _ in range(2):
        grads = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), jnp.float32), params)
        (expected, states[0]), (actual, states[1]) = (
            optimizer.update(grads, state, params)
            for optimizer, state in zip(optimizers, states, strict=True)
        )
        gradient = np.asarray(grads["kernel"], np.float64)
        momentum = 0.8 * momentum + gradient
        nesterov = 0.8 * momentum + gradient
        for matrix, step in zip(nesterov, actual.pop("kernel"), strict=True):
            left, _, right = np.linalg.svd(matrix, full_matrices=False)
            scaled = left.T @ (np.asarray(step, np.float64) / (-0.1 * 0.2 * 5**0.5)) @ right.T
            values = np.diag(scaled)
            assert ((values > 0.65) & (values < 1.2)).all()
            np.testing.assert_allclose(scaled, np.diag(values), atol=1e-4)
        del expected["kernel"]
        jax.tree.map(np.testing.assert_array_equal, actual, expected)


def test_updates_below_the_precision_of_bfloat16_are_not_lost():
    """The parameters are those of training in float32, rounded; A_log is in float32 anyway."""
    config = dataclasses.replace(CONFIG, learning_rate=1e-4, min_learning_rate=1e-4, steps=20)
    optimizer = optimizer_of(config)
    exact = {"kernel": jnp.linspace(1.0, 2.0, 8)[None], "A_log": jnp.ones(3)}
    exact["kernel"] = exact["kernel"].astype(jnp.bfloat16).astype(jnp.float32)
    rounded = exact | {"kernel": exact["kernel"].astype(jnp.bfloat16)}
    initial, states = rounded, [optimizer.init(exact), optimizer.init(rounded)]
    for _ in range(20):
        updates, states[0] = optimizer.update(jax.tree.map(jnp.ones_like, exact), states[0], exact)
        exact = optax.apply_updates(exact, updates)
        grads = jax.tree.map(jnp.ones_like, rounded)
        updates, states[1] = optimizer.update(grads, states[1], rounded)
        rounded = optax.apply_updates(rounded, updates)
    assert rounded["kernel"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(rounded["kernel"], exact["kernel"].astype(jnp.bfloat16))
    np.testing.assert_array_equal(rounded["A_log"], exact["A_log"])
    assert np.any(rounded["kernel"] != initial["kernel"])


def test_the_moving_average_of_the_parameters():
    """Of all updates, with weights 0.9^age: the initial parameters are no part of it."""
    optimizer = optimizer_of(dataclasses.replace(CONFIG, ema_decay=0.9))
    params = {"scale": jnp.full(2, 100.0)}
    state, values = optimizer.init(params), []
    for update in range(1, 5):
        updates, state = optimizer.update({"scale": jnp.ones(2)}, state, params)
        params = optax.apply_updates(params, updates)
        values.append(np.asarray(params["scale"], np.float64))
        expected = np.average(values, axis=0, weights=[0.9**age for age in range(update)][::-1])
        np.testing.assert_allclose(state.ema["scale"], expected, rtol=1e-6)


def test_only_matrices_decay():
    config = dataclasses.replace(MODEL, layers="G 2*W")  # stacked layers, and one that is not
    model = nnx.eval_shape(lambda: Hymba(config, COMPUTE, nnx.Rngs(0)))
    params = nnx.to_pure_dict(nnx.state(model))
    decays: dict[bool, set[str]] = {True: set(), False: set()}
    for path, _ in jax.tree.leaves_with_path(params):
        names = [str(key.key) for key in path]
        name = names[-2] + "." + names[-1] if len(names) > 1 else names[-1]
        decays[is_matrix(path, None)].add(name)
    assert decays[True] == {
        "embedding",
        *(f"{name}_proj.kernel" for name in ("query", "key", "value", "in", "gate", "out")),
        *(f"{name}_proj.kernel" for name in ("x", "dt", "up", "down")),
    }
    assert decays[False] == {
        "meta_tokens",
        *(f"ssm.{name}" for name in ("A_log", "D", "dt_bias", "conv_kernel", "conv_bias")),
        *(f"{name}_norm.scale" for name in ("query", "key", "dt", "B", "C", "attention", "ssm")),
        *(f"{name}_norm.scale" for name in ("mixer", "mlp", "final")),
    }


def rates_of(optimizer, updates=3):
    """The rate after each update, and by how much a parameter changed at a gradient of 1."""
    params = {"scale": jnp.zeros(2)}
    state, found = optimizer.init(params), []
    for _ in range(updates):
        update, state = optimizer.update({"scale": jnp.ones(2)}, state, params)
        found.append((applied_learning_rate(state), float(-update["scale"][0])))
    return found


def test_the_rate_applied_is_known_by_any_schedule():
    sgd = optax.inject_hyperparams(optax.sgd)
    for rate in (0.25, lambda count: 0.5 / (count + 1)):
        for known, applied in rates_of(sgd(rate)):
            np.testing.assert_allclose(known, applied, rtol=1e-6)


def test_the_rate_applied_is_that_of_the_schedule():
    rates = [float(rate) for rate, _ in rates_of(optimizer_of(CONFIG), 10)]
    np.testing.assert_allclose(rates, [wsd(update) for update in range(1, 11)], rtol=1e-6)


def test_a_rate_that_the_state_lacks_is_not_guessed():
    assert rates_of(optax.sgd(0.1))[0][0] is None
    sgd = optax.inject_hyperparams(optax.sgd)
    assert rates_of(optax.chain(sgd(0.1), sgd(0.2)))[0][0] is None
