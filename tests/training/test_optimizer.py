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
    optimizer = make_optimizer(CONFIG)
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
    rates = [float(rate) for rate, _ in rates_of(make_optimizer(CONFIG), 10)]
    np.testing.assert_allclose(rates, [wsd(update) for update in range(1, 11)], rtol=1e-6)


def test_a_rate_that_the_state_lacks_is_not_guessed():
    assert rates_of(optax.sgd(0.1))[0][0] is None
    sgd = optax.inject_hyperparams(optax.sgd)
    assert rates_of(optax.chain(sgd(0.1), sgd(0.2)))[0][0] is None
