"""Training of an adapter, or of all but frozen parameters: steps, and runs from end to end."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from data.chat import TEMPLATE
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from inference.models import TINY, byte_tokenizer, make_model
from training.tiny import MODEL

from hymba_jax.checkpoint.checkpoints import load_params
from hymba_jax.checkpoint.load import load_model
from hymba_jax.checkpoint.save import save_model
from hymba_jax.checkpoint.train_state import (
    TrainState,
    abstract_train_state,
    init_state,
    init_state_from,
)
from hymba_jax.config import ComputeConfig
from hymba_jax.config.adapter import AdapterConfig
from hymba_jax.config.data import DataConfig
from hymba_jax.config.parallel import ParallelConfig
from hymba_jax.config.run import RunConfig
from hymba_jax.config.training import TrainingConfig
from hymba_jax.convert.export import ExportConfig
from hymba_jax.convert.export import main as export
from hymba_jax.data import Batch
from hymba_jax.data.batch import abstract_batch
from hymba_jax.errors import HymbaError
from hymba_jax.inference.loading import ModelChoice
from hymba_jax.model import Hymba
from hymba_jax.model.abstract import abstract_model
from hymba_jax.model.trainable import Trainable
from hymba_jax.parallel.mesh import batch_sharding, make_mesh
from hymba_jax.tokenizer import Tokenizer
from hymba_jax.training import loop
from hymba_jax.training.loss import make_loss_fn, next_token_loss
from hymba_jax.training.optimizer import make_optimizer
from hymba_jax.training.step import compile_train_step, make_train_step

LENGTH = 8
EIGHT_HEADS = dataclasses.replace(
    MODEL, attention=dataclasses.replace(MODEL.attention, num_heads=4, num_kv_heads=2)
)
# For what does not depend on the kind of layer; it compiles in half the time.
ATTENTION_ALONE = dataclasses.replace(EIGHT_HEADS, layers="2*L")
TRAINING = TrainingConfig(batch_size=8, warmup_steps=0, ema_decay=0.5, weight_decay=0.1)
DORA = AdapterConfig(kind="dora", rank=2, dropout=0.3, train=("A_log", "*norm"))


class Step:
    """A compiled step of a model on some devices."""

    def __init__(
        self,
        trainable,
        *,
        model=EIGHT_HEADS,
        devices=1,
        parallel=None,
        micro_batch_size=8,
        **compute,
    ):
        self.model = model
        self.optimizer, self.compute = make_optimizer(TRAINING), ComputeConfig(**compute)
        self.mesh = make_mesh(jax.devices()[:devices], parallel)
        self.abstract = abstract_train_state(
            model, self.compute, self.optimizer, self.mesh, trainable
        )
        step = make_train_step(
            make_loss_fn(next_token_loss, self.abstract.graph),
            self.optimizer,
            micro_batch_size=micro_batch_size,
            trainable=trainable,
            seed=5,
        )
        self.place = batch_sharding(self.mesh)
        with jax.set_mesh(self.mesh):
            batch = abstract_batch(8, LENGTH, self.place)
            self.compiled = compile_train_step(step, self.abstract.state, batch)

    def initialize(self):
        return init_state(self.model, self.compute, self.optimizer, self.abstract, seed=3)

    def run(self, state, steps=1):
        state = jax.device_put(jax.tree.map(jnp.copy, state), self.abstract.shardings)
        tokens = np.random.default_rng(1).integers(3, 61, (8, LENGTH + 1), np.int32)
        batch = jax.device_put(Batch(tokens[:, :-1], tokens[:, 1:]), self.place)
        for _ in range(steps):
            state, metrics = self.compiled(state, batch)
        return jax.device_get(state), metrics


@pytest.fixture(scope="module")
def dora():
    return Step(Trainable(DORA))


@pytest.fixture(scope="module")
def state(dora):
    """The state before the first step, with an adapter that does something."""
    params, rng = flatten_dict(jax.device_get(dora.initialize().params)), np.random.default_rng(1)
    for path, leaf in params.items():
        if "adapter" in path:
            params[path] = leaf + 0.1 * rng.normal(size=leaf.shape).astype(np.float32)
    params = jax.tree.map(jnp.asarray, unflatten_dict(params))
    return TrainState(params, dora.abstract.init_optimizer(dora.optimizer, params))


def is_trained(path):
    return "adapter" in path or "A_log" in path or any("norm" in str(part) for part in path)


def test_what_is_trained_changes_and_nothing_else_has_a_state(dora, state):
    after, _ = dora.run(state, steps=2)
    before = flatten_dict(state.params)
    for path, leaf in flatten_dict(after.params).items():
        assert np.array_equal(leaf, before[path]) != is_trained(path), path
    trained = {path for path in before if is_trained(path)}
    for name in ("mu", "nu", "ema"):
        assert flatten_dict(optax.tree.get(after.optimizer, name)).keys() == trained


def test_gradients_are_those_of_the_whole_model(dora, state):
    """Of the loss by everything at once; Adam's mean is a tenth of the first."""
    after, metrics = dora.run(state)
    tokens = jnp.asarray(np.random.default_rng(1).integers(3, 61, (8, LENGTH + 1), np.int32))
    seeds = jax.random.bits(jax.random.fold_in(jax.random.key(5), 0), (8,), jnp.uint32)
    batch = Batch(tokens[:, :-1], tokens[:, 1:], dropout_seeds=seeds)
    loss_fn = make_loss_fn(next_token_loss, dora.abstract.graph)
    grads = jax.jit(jax.grad(lambda params: loss_fn(params, batch)["loss"].mean))(state.params)
    trained = {path: leaf for path, leaf in flatten_dict(grads).items() if is_trained(path)}
    norm = np.sqrt(sum(np.square(leaf).sum() for leaf in trained.values()))
    np.testing.assert_allclose(metrics["grad_norm"].mean, norm, rtol=1e-5)
    clipped = min(1, TRAINING.clip_norm / norm)
    for path, mean in flatten_dict(optax.tree.get(after.optimizer, "mu")).items():
        wanted = 0.1 * clipped * np.asarray(trained[path])
        np.testing.assert_allclose(mean, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


def test_neither_micro_batches_nor_devices_change_a_step(dora, state):
    """With dropout, the masks of which belong to rows; the tolerance is that of
    `tests/test_sharding.py`, twice: sums are over micro-batches, too."""
    parallel = ParallelConfig(data=2, fsdp=2, tensor=2)
    sharded = Step(Trainable(DORA), devices=8, parallel=parallel, micro_batch_size=4, remat="block")
    (expected, metrics), (actual, others) = dora.run(state), sharded.run(state)
    np.testing.assert_allclose(others["loss"].mean, metrics["loss"].mean, rtol=1e-5)
    wanted = flatten_dict(optax.tree.get(expected.optimizer, "mu"))
    for path, mean in flatten_dict(optax.tree.get(actual.optimizer, "mu")).items():
        atol = 2e-5 * np.abs(wanted[path]).max()
        np.testing.assert_allclose(mean, wanted[path], rtol=0, atol=atol, err_msg=str(path))


def test_dropout_differs_from_step_to_step(dora, state):
    """Of the same parameters, which leaves rounding of 5e-7 without other masks."""
    first, metrics = dora.run(state)
    frozen = first._replace(params=state.params)
    _, others = dora.run(frozen)
    assert abs(others["loss"].mean - metrics["loss"].mean) > 1e-5


def test_a_frozen_base_may_be_bfloat16():
    lora = Trainable(AdapterConfig(kind="lora", rank=2))
    step = Step(lora, model=ATTENTION_ALONE, param_dtype="bfloat16")
    initial = step.initialize()
    after, _ = step.run(initial)
    before = flatten_dict(initial.params)
    for path, leaf in flatten_dict(after.params).items():
        assert np.array_equal(leaf, before[path]) != ("adapter" in path), path
        assert leaf.dtype == (jnp.float32 if "adapter" in path else before[path].dtype)
    weights = jax.tree.leaves(optax.tree.get(after.optimizer, "weights"))
    assert weights == []  # no float32 copies of what is not trained


def test_frozen_parameters_stay():
    names = ("embedding", "attention", "mlp")
    step = Step(Trainable(freeze=names), model=ATTENTION_ALONE)
    initial = step.initialize()
    after, _ = step.run(initial)
    before = flatten_dict(initial.params)
    for path, leaf in flatten_dict(after.params).items():
        is_frozen = bool({*names} & {*path})
        assert np.array_equal(leaf, before[path]) == is_frozen, path


def test_magnitudes_of_an_initial_model_are_its_own(dora):
    with jax.set_mesh(dora.mesh):
        model = Hymba(EIGHT_HEADS, dora.compute, nnx.Rngs(9))
        params = nnx.to_pure_dict(nnx.state(model))
        expected = jax.device_get(params)
        arguments = EIGHT_HEADS, dora.compute, dora.optimizer, dora.abstract, 3
        started = flatten_dict(init_state_from(params, *arguments).params)
    for path, leaf in flatten_dict(expected).items():
        np.testing.assert_array_equal(started[path], leaf)
        if (*path[:-1], "adapter", "magnitude") in started:
            magnitude = started[*path[:-1], "adapter", "magnitude"]
            np.testing.assert_allclose(magnitude, np.linalg.norm(leaf, axis=-2), rtol=1e-5)


CONFIG = dataclasses.replace(TINY, layers="W", max_positions=64)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run that trains an adapter of a model, with its output."""
    directory = tmp_path_factory.mktemp("adapter")
    save_model(directory / "model", make_model(CONFIG), byte_tokenizer())
    (directory / "chat.jinja").write_text(TEMPLATE)
    (directory / "corpus").mkdir()
    for i in range(8):
        text = f"the {i} old dogs and the red hats sat. " * 20
        (directory / "corpus" / f"{i}.txt").write_text(text)
    return RunConfig(
        output=str(directory / "run"),
        init_from=str(directory / "model"),
        model=CONFIG,
        adapter=AdapterConfig(kind="dora", rank=2, dropout=0.2, targets=("query_proj", "mlp")),
        data=DataConfig(
            str(directory / "corpus"),
            tokenizer=str(directory / "model"),
            chat_template=str(directory / "chat.jinja"),
            sequence_length=24,
        ),
        training=TrainingConfig(
            steps=4,
            batch_size=2,
            schedule="constant",
            warmup_steps=0,
            learning_rate=0.03,
            sample_tokens=0,
        ),
    )


def train(run, monkeypatch):
    mesh = make_mesh(jax.devices()[:1])
    monkeypatch.setattr(loop, "make_mesh", lambda parallel: mesh)
    loop.train(run, generate=lambda *_: "")


def loaded(directory):
    return flatten_dict(nnx.to_pure_dict(nnx.state(load_model(directory))))


def stored(run):
    mesh = make_mesh(jax.devices()[:1])
    _, like = abstract_model(CONFIG, run.compute, mesh, run.adapter)
    return load_params(run.output, like)


def test_a_run_resumes_exactly_and_its_directory_is_a_model(run, monkeypatch, tmp_path, capsys):
    train(run, monkeypatch)
    said = capsys.readouterr().out
    assert re.search(r"dora of rank 2; adapted: mixer\.attention\.query_proj x 1, ", said)
    assert re.search(r"trained: [\d,]+ of [\d,]+ parameters\n", said)
    half = dataclasses.replace(run.training, steps=2)
    parts = dataclasses.replace(run, output=f"{run.output}-in-parts", training=half)
    train(parts, monkeypatch)
    parts = dataclasses.replace(parts, training=run.training)
    train(parts, monkeypatch)
    jax.tree.map(np.testing.assert_array_equal, stored(parts), stored(run))
    other = dataclasses.replace(parts, adapter=dataclasses.replace(run.adapter, rank=3))
    with pytest.raises(HymbaError, match=r"different settings \(adapter\.rank was 2, is 3\)"):
        train(other, monkeypatch)

    with pytest.raises(HymbaError, match="write a model with --merge, or the adapter with --adapt"):
        export(ExportConfig(run.output, str(tmp_path / "neither")))
    for form in ("merge", "adapter"):
        export(ExportConfig(run.output, str(tmp_path / form), **{form: True}))
    trained, base, merged = map(loaded, (run.output, run.init_from, tmp_path / "merge"))
    merge_peft = str(tmp_path / "adapter")
    export(ExportConfig(run.init_from, str(tmp_path / "of base"), merge_peft=merge_peft))
    assert Tokenizer.load(run.init_from).chat_template is None
    assert Tokenizer.load(tmp_path / "of base").chat_template == TEMPLATE
    model = ModelChoice(run.init_from, adapter=str(tmp_path / "adapter")).load()
    assert model.tokenizer.chat_template == TEMPLATE
    adapted = model.engine.params
    own = ModelChoice(run.output).load().engine.params
    for path, kernel in merged.items():
        # By one formula, to the rounding of another order of sums.
        np.testing.assert_allclose(kernel, trained[path], rtol=0, atol=1e-6)
        is_target = bool({"query_proj", "mlp"} & {*path})
        assert np.array_equal(kernel, base[path]) != is_target, path
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6), adapted, own)


def test_an_adapter_needs_a_model(run, monkeypatch):
    with pytest.raises(HymbaError, match=r"adapter\.kind is dora, and there is no model to adapt"):
        train(dataclasses.replace(run, output=f"{run.output}-none", init_from=""), monkeypatch)


def test_an_adapter_and_freezing_exclude_each_other(run):
    freeze = dataclasses.replace(run.training, freeze=("mlp",))
    with pytest.raises(HymbaError, match=r"training\.freeze is set, but an adapter freezes"):
        dataclasses.replace(run, training=freeze)
