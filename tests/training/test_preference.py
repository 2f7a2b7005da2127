"""Preference optimization against the formula in float64, from the logits of each answer alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from training.tiny import COMPUTE, MODEL

from hymba_jax.checkpoint.train_state import TrainState, abstract_train_state
from hymba_jax.config.dpo import DPOConfig
from hymba_jax.config.parallel import ParallelConfig
from hymba_jax.config.training import TrainingConfig
from hymba_jax.data import IGNORED_TARGET, Batch
from hymba_jax.data.batch import abstract_batch
from hymba_jax.errors import HymbaError
from hymba_jax.model import Hymba
from hymba_jax.parallel.mesh import batch_sharding, make_mesh
from hymba_jax.training import preference
from hymba_jax.training.loss import make_loss_fn
from hymba_jax.training.optimizer import make_optimizer
from hymba_jax.training.preference import Sides, preference_loss
from hymba_jax.training.step import compile_train_step, make_train_step

CONFIG = dataclasses.replace(MODEL, layers="W", tie_embeddings=False)
LENGTH = 32
# Tokens before the answer, and of the answer, of each side of the pairs; no two pairs share tokens.
PAIRS = [((3, 4), (3, 6)), ((2, 5), (2, 1)), ((4, 3), (4, 4)), ((1, 7), (1, 2))]
ROWS = [(0, 1), (2,), (3,)]
PER_PAIR = MODEL.vocab_size // len(PAIRS)


@pytest.fixture(scope="module")
def documents():
    """Of each pair the tokens of its sides, and how many of them are the prompt."""
    rng = np.random.default_rng(0)
    return [
        [
            (rng.integers(pair * PER_PAIR, (pair + 1) * PER_PAIR, prompt + answer), prompt)
            for prompt, answer in sides
        ]
        for pair, sides in enumerate(PAIRS)
    ]


@pytest.fixture(scope="module")
def reference():
    """As if of another model: of each pair."""
    return np.random.default_rng(1).normal(-20, 3, (len(PAIRS), 2)).astype(np.float32)


def make_batch(documents, reference, rows=ROWS):
    """The pairs in these rows, packed by hand."""
    inputs, targets, segment_ids = np.zeros((3, len(rows), LENGTH), np.int32)
    targets[:] = IGNORED_TARGET
    given = np.zeros((len(rows), LENGTH), np.float32)
    for row, pairs in enumerate(rows):
        at = 0
        for number, pair in enumerate(pairs):
            for side, (tokens, prompt) in enumerate(documents[pair]):
                own = slice(at, at + len(tokens) - 1)
                inputs[row, own], segment_ids[row, own] = tokens[:-1], 2 * number + side + 1
                targets[row, at + prompt - 1 : own.stop] = tokens[prompt:]
                given[row, at] = reference[pair, side]
                at = own.stop
    return jax.tree.map(jnp.asarray, Batch(inputs, targets, segment_ids, given))


@pytest.fixture(scope="module")
def model():
    graph, _ = nnx.split(Hymba.abstract(CONFIG, COMPUTE))
    init = jax.jit(lambda: nnx.state(Hymba(CONFIG, COMPUTE, nnx.Rngs(0))))
    return graph, init()


@pytest.fixture(scope="module")
def alone(model, documents):
    """The log-probability of each answer, and its gradient, from the logits of its side alone."""
    graph, params = model

    @jax.jit
    def gradient(params, inputs, targets, counts):
        def log_prob(params):
            logits = nnx.merge(graph, params)(inputs)
            picked = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], -1)
            return (picked[..., 0] * counts).sum(), logits

        return jax.grad(log_prob, has_aux=True)(params)

    found = []
    for sides in documents:
        for tokens, prompt in sides:
            inputs, targets = np.zeros((2, 1, 12), np.int32)
            counts, size = np.zeros((1, 12)), len(tokens) - 1
            inputs[0, :size], targets[0, :size] = tokens[:-1], tokens[1:]
            counts[0, prompt - 1 : size] = 1  # what is behind a position does not change it
            grads, logits = gradient(params, inputs, targets, counts)
            logits = np.asarray(logits[0], np.float64)
            log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
            picked = log_probs[np.arange(12), targets[0]]
            found.append((picked @ counts[0], [np.float64(g) for g in jax.tree.leaves(grads)]))
    return found


def formula(dpo, log_probs, reference, lengths):
    """Of each pair the loss, its derivatives by both log-probabilities, and the margin."""
    ratios = log_probs - (reference if dpo.loss == "sigmoid" else 0)
    scale = 1 / lengths if dpo.length_normalized or dpo.loss == "simpo" else np.ones_like(lengths)
    margins = dpo.beta * (ratios * scale) @ [1, -1]
    smoothing, above = dpo.label_smoothing, margins - dpo.gamma
    losses = (1 - smoothing) * np.logaddexp(0, -above) + smoothing * np.logaddexp(0, above)
    sigmoid = 1 / (1 + np.exp(-above))
    slope = -(1 - smoothing) * (1 - sigmoid) + smoothing * sigmoid
    return losses, dpo.beta * slope[:, None] * scale * [1, -1], margins


LENGTHS = np.array([[chosen[1], rejected[1]] for chosen, rejected in PAIRS], float)
SIGMOID = DPOConfig(beta=0.3, label_smoothing=0.1)
SIMPO = DPOConfig(loss="simpo", beta=2.0, gamma=0.5)


@pytest.fixture(scope="module")
def gradient(model):
    """Of the loss summed over the pairs of three rows; with the averages."""
    graph, params = model

    @jax.jit
    def gradient(batch):
        def loss(params):
            averages = preference_loss(nnx.merge(graph, params), batch, SIGMOID)
            return averages["loss"].total, averages

        return jax.grad(loss, has_aux=True)(params)

    return gradient


def test_values_and_gradients(gradient, documents, reference, alone):
    """Of rows with two pairs and with one, to float32 sums of another order."""
    grads, averages = gradient(make_batch(documents, reference))
    log_probs = np.array([value for value, _ in alone]).reshape(-1, 2)
    losses, weights, margins = formula(SIGMOID, log_probs, reference, LENGTHS)
    expected = {
        "loss": losses.mean(),
        "reward_accuracy": (margins > 0).mean(),
        "reward_margin": margins.mean(),
        "chosen_log_prob": log_probs[:, 0].mean(),
        "rejected_log_prob": log_probs[:, 1].mean(),
        "kl": (log_probs - reference).mean(),
    }
    assert {int(average.weight) for average in averages.values()} == {len(PAIRS)}
    found = {name: float(average.mean) for name, average in averages.items()}
    # A margin is a small difference of rewards.
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert 0 < expected["reward_accuracy"] < 1
    for index, leaf in enumerate(jax.tree.leaves(grads)):
        wanted = sum(
            weight * of_answer[index]
            for weight, (_, of_answer) in zip(weights.ravel(), alone, strict=True)
        )
        np.testing.assert_allclose(leaf, wanted, rtol=0, atol=2e-5 * np.abs(wanted).max())


def test_batches_add_up(gradient, documents, reference):
    """Of unequally many pairs in their rows: so that gradient accumulation is exact."""
    whole, *parts = (
        gradient(make_batch(documents, reference, rows))
        for rows in (ROWS, [(0, 1), (), ()], [(), (2,), (3,)])
    )
    for total, *values in zip(*map(jax.tree.leaves, (whole, *parts)), strict=True):
        atol = 1e-6 * np.abs(total).max()
        np.testing.assert_allclose(np.add(*values), total, rtol=0, atol=atol)


@pytest.mark.parametrize(
    "dpo",
    [
        SIGMOID,
        SIMPO,
        DPOConfig(length_normalized=True, beta=5.0),
        DPOConfig(loss="simpo", beta=3.0, label_smoothing=0.2),
    ],
)
def test_losses_and_their_derivatives(monkeypatch, model, documents, reference, dpo):
    """Of log-probabilities that are given."""
    batch = make_batch(documents, reference, [(pair,) for pair in range(len(PAIRS))])
    log_probs = np.random.default_rng(2).normal(-20, 3, (len(PAIRS), 2))

    def loss(log_probs):
        padded = jnp.pad(log_probs[:, None], ((0, 0), (0, LENGTH // 2 - 1), (0, 0)))
        sides = Sides(padded[..., 0], padded[..., 1])
        monkeypatch.setattr(preference, "answer_log_probs", lambda *_: sides)
        return preference_loss(nnx.merge(*model), batch, dpo)["loss"].total

    value, derivative = jax.value_and_grad(loss)(jnp.float32(log_probs))
    losses, weights, _ = formula(dpo, log_probs, reference, LENGTHS)
    np.testing.assert_allclose(value, losses.sum(), rtol=1e-5)
    np.testing.assert_allclose(derivative, weights, rtol=2e-5, atol=1e-12)


def test_what_a_pair_is_packed_with_does_not_change_its_gradient(gradient, documents, reference):
    """Bit for bit: of the embeddings of its own tokens, which the other pairs do not have."""
    found = []
    for rows in ([(0,), (1,), (2,)], [(0, 1), (2,), (3,)], [(0, 3), (), ()], [(1,), (0, 2), (3,)]):
        grads, _ = gradient(make_batch(documents, reference, rows))
        found.append(np.asarray(grads["embedding"][...])[:PER_PAIR])
    assert np.abs(found[0]).max() > 0
    for other in found[1:]:
        np.testing.assert_array_equal(other, found[0])


class Step:
    """A compiled step on some devices."""

    def __init__(self, rows, devices=1, parallel=None, micro_batch_size=4):
        optimizer = make_optimizer(TrainingConfig(batch_size=rows, warmup_steps=0))
        self.mesh = make_mesh(jax.devices()[:devices], parallel)
        self.optimizer = optimizer
        self.abstract = abstract_train_state(CONFIG, COMPUTE, optimizer, self.mesh)

        def objective(model, batch):
            return preference_loss(model, batch, SIGMOID)

        loss_fn = make_loss_fn(objective, self.abstract.graph)
        step = make_train_step(loss_fn, optimizer, micro_batch_size=micro_batch_size)
        self.place = batch_sharding(self.mesh)
        with jax.set_mesh(self.mesh):
            batch = abstract_batch(rows, LENGTH, self.place, segment_ids=True, reference=True)
            self.compiled = compile_train_step(step, self.abstract.state, batch)

    def run(self, params, batch):
        """The gradient, as Adam's mean has it, and the metrics."""
        params = jax.tree.map(jnp.copy, nnx.to_pure_dict(params))
        state = TrainState(params, self.abstract.init_optimizer(self.optimizer, params))
        state = jax.device_put(state, self.abstract.shardings)
        state, metrics = self.compiled(state, jax.device_put(batch, self.place))
        means = optax.tree.get(state.optimizer, "mu")
        del metrics["learning_rate"]
        return jax.device_get((means, {name: value.mean for name, value in metrics.items()}))


def assert_same(actual, expected):
    """Up to the order of float32 sums, as in tests/test_sharding.py."""
    found, wanted = ({name: float(v) for name, v in each[1].items()} for each in (actual, expected))
    assert found == pytest.approx(wanted, rel=2e-5)
    for value, wanted in zip(*map(jax.tree.leaves, (actual[0], expected[0])), strict=True):
        np.testing.assert_allclose(value, wanted, rtol=0, atol=2e-5 * np.abs(wanted).max())


@pytest.mark.slow
def test_micro_batches_with_unequally_many_pairs(model, documents, reference):
    batch = make_batch(documents, reference, [(0, 1), (2, 3), (0,), (3,)])
    expected = Step(4).run(model[1], batch)
    assert_same(Step(4, micro_batch_size=2).run(model[1], batch), expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    "parallel",
    [ParallelConfig(data=2, fsdp=2, tensor=2), ParallelConfig(fsdp=2, sequence=2, tensor=2)],
)
def test_sharded(model, documents, reference, parallel):
    rows = [(0, 1), (2, 3), (0,), (3,)]
    batch = make_batch(documents, reference, rows)
    expected = Step(4).run(model[1], batch)
    assert_same(Step(4, 8, parallel).run(model[1], batch), expected)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"gamma": 1.0}, "gamma is 1.0, and loss sigmoid does not use it"),
        ({"loss": "simpo", "length_normalized": True}, "length_normalized is True, and loss simpo"),
        ({"beta": 0.0}, "beta is 0"),
        ({"label_smoothing": 0.6}, "label_smoothing is 0.6"),
    ],
)
def test_options_that_are_refused(options, problem):
    with pytest.raises(HymbaError, match=f"dpo config: {problem}"):
        DPOConfig(**options)
