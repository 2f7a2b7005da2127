import dataclasses
import functools
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from training.tiny import COMPUTE, MODEL

from hymba_jax.checkpoint.checkpoints import Checkpoints, LoopState
from hymba_jax.checkpoint.train_state import TrainState, abstract_train_state, init_state
from hymba_jax.config.data import DataConfig
from hymba_jax.config.run import RunConfig
from hymba_jax.config.training import TrainingConfig
from hymba_jax.data import IGNORED_TARGET, Batch
from hymba_jax.data.batch import abstract_batch
from hymba_jax.model import Hymba
from hymba_jax.parallel.mesh import batch_sharding, make_mesh
from hymba_jax.training.loss import Average, make_loss_fn, next_token_loss
from hymba_jax.training.optimizer import make_optimizer
from hymba_jax.training.step import compile_train_step, make_train_step, run_step

LENGTH = 8


class Setup:
    """A compiled training step on some of the devices."""

    def __init__(self, num_devices: int, accumulation: int):
        config = TrainingConfig(
            batch_size=8, gradient_accumulation_steps=accumulation, warmup_fraction=0.0
        )
        mesh = make_mesh(jax.devices()[:num_devices])
        optimizer = make_optimizer(config)
        self.place = batch_sharding(mesh)
        self.abstract = abstract_train_state(MODEL, COMPUTE, optimizer, mesh)
        step = make_train_step(
            make_loss_fn(next_token_loss, self.abstract.graph),
            optimizer,
            micro_batch_size=config.micro_batch_size,
        )
        batch = abstract_batch(config.batch_size, LENGTH, self.place)
        self.step = compile_train_step(step, self.abstract.state, batch)
        self.optimizer = optimizer

    def run(self, state, batch, steps=2):
        """State and metrics after some steps; the second one's loss tests the first's update."""
        state = jax.tree.map(jnp.copy, state)  # the step takes the memory of the one it is given
        state = jax.device_put(state, self.abstract.shardings)
        for _ in range(steps):
            state, metrics = self.step(state, jax.device_put(batch, self.place))
        return state, metrics


@pytest.fixture(scope="module")
def one_device():
    return Setup(num_devices=1, accumulation=1)


@pytest.fixture(scope="module")
def state(one_device):
    return init_state(MODEL, COMPUTE, one_device.optimizer, one_device.abstract, seed=3)


@pytest.fixture(scope="module")
def batch():
    tokens = np.random.default_rng(1).integers(0, 61, (8, LENGTH + 1)).astype(np.int32)
    targets = tokens[:, 1:].copy()
    targets[:3, 2:] = IGNORED_TARGET  # so that micro-batches count unequally
    return Batch(inputs=tokens[:, :-1], targets=targets)


def assert_same(actual, expected):
    """Equal but for the order of float32 sums; Adam's first steps turn rounding into sign."""
    np.testing.assert_allclose(actual[1]["loss"].mean, expected[1]["loss"].mean, rtol=1e-5)
    np.testing.assert_allclose(
        actual[1]["grad_norm"].mean, expected[1]["grad_norm"].mean, rtol=1e-4
    )
    moments, expected_moments = (
        [leaf for leaf in jax.tree.leaves(result[0].optimizer) if leaf.ndim]
        for result in (actual, expected)
    )
    for moment, expected_moment in zip(moments, expected_moments, strict=True):
        np.testing.assert_allclose(moment, expected_moment, rtol=2e-3, atol=1e-6)


def test_metrics_are_of_the_model_before_the_update(one_device, state, batch):
    model = nnx.merge(one_device.abstract.graph, state.params)
    logits = jax.jit(model)(jnp.asarray(batch.inputs))
    logits = np.asarray(logits, np.float64)
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    counts = batch.targets != IGNORED_TARGET
    picked = np.take_along_axis(log_probs, np.where(counts, batch.targets, 0)[..., None], -1)
    _, metrics = one_device.run(state, batch, steps=1)
    np.testing.assert_allclose(metrics["loss"].mean, -picked[..., 0][counts].mean(), rtol=1e-5)
    assert int(metrics["loss"].weight) == counts.sum()


def test_training_learns_a_batch_by_heart(one_device, state, batch):
    _, first = one_device.run(state, batch, steps=1)
    _, last = one_device.run(state, batch, steps=200)
    assert last["loss"].mean < 0.2 * first["loss"].mean


@pytest.mark.slow
def test_gradient_accumulation_equals_one_big_batch(one_device, state, batch):
    micro_batches = Setup(num_devices=1, accumulation=4)
    assert_same(micro_batches.run(state, batch), one_device.run(state, batch))


def test_any_objective_is_a_weighted_mean():
    """Least squares over the inputs that are not 0, of micro-batches of unequal counts, by SGD."""

    def loss_fn(params, batch):
        counts = batch.inputs != 0
        error = jnp.where(counts, params["weight"] * batch.inputs - batch.targets, 0.0)
        return {
            "loss": Average((error**2).sum(), counts.sum()),
            "size": Average(batch.targets.sum(), batch.targets.size),
        }

    inputs = np.array([[1, 2, 3], [0, 0, 4], [0, 0, 0], [5, 0, 6]], np.int32)
    batch = Batch(inputs=inputs, targets=np.arange(12, dtype=np.int32).reshape(4, 3))
    x, y = inputs[inputs != 0].astype(float), batch.targets[inputs != 0].astype(float)
    gradient = (2 * (0.5 * x - y) * x).mean()
    optimizer = optax.sgd(0.01)
    params = {"weight": jnp.float32(0.5)}
    for micro_batch_size in (1, 2, 4):
        step = make_train_step(loss_fn, optimizer, micro_batch_size=micro_batch_size)
        state, metrics = step(TrainState(params, optimizer.init(params)), batch)
        np.testing.assert_allclose(state.params["weight"], 0.5 - 0.01 * gradient, rtol=1e-6)
        np.testing.assert_allclose(metrics["loss"].mean, ((0.5 * x - y) ** 2).mean(), rtol=1e-6)
        np.testing.assert_allclose(metrics["grad_norm"].mean, abs(gradient), rtol=1e-6)
        assert metrics["size"].mean == 5.5
        assert "learning_rate" not in metrics
        assert "padding" not in metrics
    packed = batch._replace(segment_ids=(inputs != 0).astype(np.int32))
    _, metrics = step(TrainState(params, optimizer.init(params)), packed)
    assert metrics["padding"] == (6, 12)


@pytest.mark.parametrize("parts", [{"micro_batch_size": 1}, {"reduction_shards": 512}])
def test_gradients_of_bfloat16_parameters_are_added_up_in_float32(parts):
    """Of 512 rows with the gradient 1 each; in bfloat16 256 and 1 are 256."""

    def loss_fn(params, batch):
        total = (params["weight"] * batch.inputs).sum().astype(jnp.float32)
        return {"loss": Average(total, jnp.int32(batch.inputs.size))}

    optimizer = optax.sgd(1.0)
    params = {"weight": jnp.bfloat16(0)}
    batch = Batch(inputs=np.ones((512, 1), np.int32), targets=np.ones((512, 1), np.int32))
    step = make_train_step(loss_fn, optimizer, **{"micro_batch_size": 512} | parts)
    with jax.set_mesh(make_mesh(jax.devices()[:1])):
        state, metrics = jax.jit(step)(TrainState(params, optimizer.init(params)), batch)
    assert metrics["grad_norm"].mean == 1
    assert state.params["weight"] == -1


def test_the_z_loss_of_the_config_is_the_objectives():
    given = []

    def objective(model, batch, z_loss=0.0):
        given.append(z_loss)
        return next_token_loss(model, batch)

    optimizer, mesh = optax.sgd(0.01), make_mesh(jax.devices()[:1])
    abstract = abstract_train_state(MODEL, COMPUTE, optimizer, mesh)
    for weight in (0.0, 1e-4):
        training, data = TrainingConfig(z_loss=weight), DataConfig(sequence_length=LENGTH)
        run = RunConfig(model=MODEL, data=data, training=training)
        step, batch = run_step(run, objective, abstract.graph, optimizer, mesh)
        with jax.set_mesh(mesh):
            jax.eval_shape(step, abstract.state, batch)
    assert set(given) == {0.0, 1e-4}


@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_an_update_that_is_not_finite_is_skipped(value):
    """Of the loss, or of the gradient alone, as the root of 0 has; by SGD with momentum."""

    def loss_fn(params, batch):
        scale = jnp.where(batch.inputs == 7, value, 1.0)
        roots = jnp.sqrt(params["weight"] * jnp.where(batch.inputs == 8, 0.0, 1.0))
        return {"loss": Average((scale * roots * batch.targets).sum(), batch.targets.size)}

    optimizer = optax.sgd(0.01, 0.9)
    params = {"weight": jnp.float32(0.5)}
    state = TrainState(params, optimizer.init(params))
    step = make_train_step(loss_fn, optimizer, micro_batch_size=2, skip_nonfinite=True)
    targets = np.ones((4, 3), np.int32)
    for bad in (7, 8):
        inputs = np.ones((4, 3), np.int32)
        following, metrics = step(state, Batch(inputs=inputs, targets=targets))
        assert metrics["skipped"] == 0
        assert following.params["weight"] != 0.5
        inputs[2, 1] = bad
        following, metrics = step(state, Batch(inputs=inputs, targets=targets))
        assert metrics["skipped"] == 1
        assert np.isfinite(metrics["loss"].mean) == (bad == 8)
        jax.tree.map(np.testing.assert_array_equal, following, state)


@pytest.mark.slow  # both are in 2x2x2-odd-sequence of tests/test_sharding.py
def test_many_devices_and_gradient_accumulation_equal_one_big_batch(one_device, state, batch):
    actual = Setup(num_devices=4, accumulation=2).run(state, batch)
    assert actual[0].params["embedding"].sharding.num_devices == 4
    assert not actual[0].params["embedding"].sharding.is_fully_replicated
    assert_same(actual, one_device.run(state, batch))


def test_a_new_state_is_as_the_abstract_one_says(one_device, state):
    abstract = one_device.abstract
    assert jax.tree.map(describe, abstract.state) == jax.tree.map(describe, state)
    expected = nnx.to_pure_dict(nnx.state(Hymba(MODEL, COMPUTE, nnx.Rngs(3))))
    assert_close = functools.partial(np.testing.assert_allclose, rtol=1e-6)  # compiled or not
    jax.tree.map(assert_close, state.params, expected)
    assert abstract.num_params == sum(leaf.size for leaf in jax.tree.leaves(expected))


def describe(array):
    return array.shape, array.dtype, array.sharding


def test_moments_lie_where_their_parameters_lie():
    mesh = make_mesh(jax.devices()[:4])
    optimizer = make_optimizer(TrainingConfig())
    state = abstract_train_state(MODEL, COMPUTE, optimizer, mesh).state
    expected = jax.tree.leaves(jax.tree.map(describe, state.params), is_leaf=is_description)
    moments = [describe(leaf) for leaf in jax.tree.leaves(state.optimizer) if leaf.ndim]
    assert moments == 2 * expected


def is_description(value):
    return isinstance(value, tuple)


MUON = make_optimizer(
    TrainingConfig(optimizer="muon", ema_decay=0.9), optax.constant_schedule(1e-3)
)
"""The states of its two parts mask one another."""


def test_masked_states_and_averages_lie_where_their_parameters_lie():
    """Of a kernel momentum, average and master weights; of others that AdamW's second moment, too,
    but for A_log, D and dt_bias, which are in float32."""
    mesh = make_mesh(jax.devices()[:8])
    compute = dataclasses.replace(COMPUTE, param_dtype="bfloat16")
    abstract = abstract_train_state(MODEL, compute, MUON, mesh)
    params = dict(jax.tree.leaves_with_path(abstract.state.params))
    found = Counter()
    for path, leaf in jax.tree.leaves_with_path(abstract.state.optimizer):
        owners = [param for param in params if path[-len(param) :] == param]
        if not owners:
            assert leaf.sharding.is_fully_replicated
            continue
        assert leaf.dtype == jnp.float32
        assert (leaf.shape, leaf.sharding) == (params[owners[0]].shape, params[owners[0]].sharding)
        found[owners[0]] += 1
    assert set(found) == set(params)
    for path, count in found.items():
        is_muon, is_float32 = path[-1].key == "kernel", params[path].dtype == jnp.float32
        assert count == 4 - is_muon - is_float32, path


def test_masked_states_are_saved_and_restored(tmp_path):
    abstract = abstract_train_state(MODEL, COMPUTE, MUON, make_mesh(jax.devices()[:4]))
    # All ones, as its counts are after the step saved.
    kept = jax.tree.map(lambda like: np.ones(like.shape, like.dtype), abstract.state)
    state = jax.device_put(kept, abstract.shardings)
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(state, LoopState(1, {}))
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        restored, _ = checkpoints.restore(abstract.state, print)
    assert jax.tree.structure(restored) == jax.tree.structure(abstract.state)
    assert jax.tree.map(describe, restored) == jax.tree.map(describe, abstract.state)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(restored), kept)


def test_a_step_of_another_optimizer_keeps_the_shapes_of_its_state(batch):
    abstract = abstract_train_state(MODEL, COMPUTE, MUON, make_mesh(jax.devices()[:1]))
    loss_fn = make_loss_fn(next_token_loss, abstract.graph)
    step = make_train_step(loss_fn, MUON, micro_batch_size=8)
    state, metrics = jax.eval_shape(step, abstract.state, batch)
    assert jax.tree.map(describe_array, state) == jax.tree.map(describe_array, abstract.state)
    assert metrics["learning_rate"].shape == ()


def describe_array(array):
    return array.shape, array.dtype


def test_the_learning_rate_of_the_metrics_is_the_one_applied(one_device, state, batch):
    """TrainingConfig's defaults without a warm-up: constant until the last fifth."""
    _, metrics = one_device.run(state, batch, steps=2)
    np.testing.assert_allclose(metrics["learning_rate"], 3e-3, rtol=1e-6)
