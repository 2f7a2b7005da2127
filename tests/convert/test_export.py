"""`hymba export`: what the standalone model holds, and what is refused."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.traverse_util import flatten_dict
from inference.models import TINY, byte_tokenizer
from random_weights import random_weights

from hymba_jax import cli
from hymba_jax.checkpoint.checkpoints import Checkpoints, LoopState, load_params
from hymba_jax.checkpoint.model_file import read_model_directory
from hymba_jax.checkpoint.run_directory import write_run_directory
from hymba_jax.checkpoint.train_state import TrainState
from hymba_jax.config import ComputeConfig
from hymba_jax.config.adapter import NO_ADAPTER, AdapterConfig
from hymba_jax.config.data import DataConfig
from hymba_jax.config.run import RunConfig
from hymba_jax.config.stages import StageConfig
from hymba_jax.config.training import TrainingConfig
from hymba_jax.convert import export
from hymba_jax.convert.export import ExportConfig, main
from hymba_jax.errors import HymbaError
from hymba_jax.model.abstract import abstract_model
from hymba_jax.parallel.mesh import make_mesh

CONFIG = dataclasses.replace(TINY, layers="2*W", max_positions=64)
COMPUTE = ComputeConfig()


def write_run(directory, states, adapter=NO_ADAPTER):
    """A run with these checkpoints, of parameters and optimizer state at each step."""
    data = DataConfig(tokenizer="bytes", sequence_length=24)
    training = TrainingConfig(steps=4, checkpoint_every=2, keep_checkpoints=2)
    run = RunConfig(
        output=str(directory),
        model=CONFIG,
        compute=COMPUTE,
        data=data,
        training=training,
        adapter=adapter,
    )
    write_run_directory(run, byte_tokenizer())
    with Checkpoints(directory, keep=len(states), keep_best=True) as checkpoints:
        checkpoints.improves(3, 1.5)
        for step, (params, optimizer) in states.items():
            state = TrainState(params, {"count": jnp.int32(step)} | optimizer)
            checkpoints.save(state, LoopState(step, {}, "", ""))


def times(factor, params):
    return jax.tree.map(lambda a: np.float32(factor) * a, params)


@pytest.fixture(scope="module")
def initial():
    return nnx.to_pure_dict(random_weights(CONFIG)[1])


@pytest.fixture(scope="module")
def run(tmp_path_factory, initial):
    directory = tmp_path_factory.mktemp("export") / "run"
    states = {step: (times(step, initial), {}) for step in (1, 2, 3, 4)}
    states[4][1]["ema"] = times(-1, initial)
    write_run(directory, states)
    return directory


@pytest.mark.parametrize(
    ("average", "step", "factor", "report"),
    [
        ("", None, 4, "step 4 of"),
        ("", "best", 3, "step 3 of"),
        ("last:2", None, 3, "mean of steps 2, 4 of"),  # 3 is not on schedule
        ("ema", None, -1, "moving average at step 4 of"),
    ],
)
def test_the_model_that_is_written(
    run, initial, tmp_path, capsys, monkeypatch, average, step, factor, report
):
    read = []

    def load(directory, abstract, step):
        read.append(step)
        return load_params(directory, abstract, step)

    monkeypatch.setattr(export, "load_params", load)
    main(ExportConfig(str(run), str(tmp_path / "model"), average, step))
    assert report in capsys.readouterr().out
    assert read_model_directory(tmp_path / "model") == (CONFIG, COMPUTE)
    like = abstract_model(CONFIG, COMPUTE, make_mesh(jax.devices()[:1]))[1]
    written = load_params(tmp_path / "model", like)
    jax.tree.map(np.testing.assert_array_equal, written, times(factor, initial))
    needed = {"": [3 if step else 4], "last:2": [2, 4], "ema": []}
    assert read == needed[average]  # no more than is needed
    assert (tmp_path / "model" / "tokenizer.json").is_file()


def test_an_earlier_stage_has_its_own_model(run, tmp_path, initial):
    """Checkpoint 2 was trained with another RoPE base than checkpoint 4."""
    staged = tmp_path / "run"
    shutil.copytree(run, staged)
    config = RunConfig.from_toml(staged / "config.toml")
    stages = {
        "short": StageConfig(steps=2, schedule="constant"),
        "long": StageConfig(steps=2, max_positions=128, rope_theta=50000.0),
    }
    training = dataclasses.replace(config.training, steps=TrainingConfig.steps)
    config = dataclasses.replace(config, stages=stages, training=training)
    (staged / "config.toml").write_text(config.to_toml())
    for step, theta, positions in ((2, 10000.0, 64), (4, 50000.0, 128)):
        main(ExportConfig(str(staged), str(tmp_path / f"{step}"), step=step))
        model, _ = read_model_directory(tmp_path / f"{step}")
        assert (model.attention.rope_theta, model.max_positions) == (theta, positions)
    with pytest.raises(HymbaError, match="steps 2, 4 are of stages with different models"):
        main(ExportConfig(str(staged), str(tmp_path / "mean"), "last:2"))
    shutil.rmtree(staged / "checkpoints" / "4")  # then the newest, 3, is of the second stage, too,
    main(ExportConfig(str(staged), str(tmp_path / "mean"), "last:1"))  # but not on schedule
    model, _ = read_model_directory(tmp_path / "mean")
    assert (model.attention.rope_theta, model.max_positions) == (10000.0, 64)


def test_what_cannot_be_exported(run, tmp_path):
    output = str(tmp_path / "model")
    for source, average, message in (
        (run, "last:3", "keeps 2 checkpoints on schedule, not 3"),
        (run, "last:0", "average is 'last:0', neither ema nor last:N"),
        (tmp_path / "none", "", "no model found"),
    ):
        with pytest.raises(HymbaError, match=message):
            main(ExportConfig(str(source), output, average))
    with pytest.raises(HymbaError, match="exists already"):
        main(ExportConfig(str(run), str(tmp_path)))
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(("options", "step"), [([], 4), (["--step", "best"], 3)])
def test_inspection_names_the_step(run, capsys, options, step):
    cli.inspect([str(run), *options], "hymba inspect")
    assert f"│ step │ {step} │" in " ".join(capsys.readouterr().out.split())


def test_a_run_without_a_moving_average(initial, tmp_path):
    write_run(tmp_path / "run", {1: (initial, {})})
    with pytest.raises(HymbaError, match="has no moving average"):
        main(ExportConfig(str(tmp_path / "run"), str(tmp_path / "model"), "ema"))


def test_forms_of_an_adapter_are_refused_where_there_is_none(run, tmp_path):
    for form in ("merge", "adapter"):
        with pytest.raises(HymbaError, match="trained no adapter: leave --merge and --adapter out"):
            main(ExportConfig(str(run), str(tmp_path / "model"), **{form: True}))
    with pytest.raises(HymbaError, match="merge writes a model, adapter an adapter: name one"):
        ExportConfig(str(run), str(tmp_path / "model"), merge=True, adapter=True)


def test_the_mean_of_adapters_is_that_of_merged_kernels(tmp_path):
    """Not the product of their means. Frozen parameters, the same in all, keep all bits."""
    adapter = AdapterConfig("dora", 2, 4.0, targets=("up_proj",))
    mesh, rng = make_mesh(jax.devices()[:1]), np.random.default_rng(0)
    _, abstract = abstract_model(CONFIG, COMPUTE, mesh, adapter)

    def drawn(like):
        return rng.normal(size=like.shape).astype(like.dtype)

    def of_step(path, a):
        return drawn(a) if "adapter" in str(path) else a

    frozen = jax.tree.map(drawn, abstract)
    states = {step: jax.tree.map_with_path(of_step, frozen) for step in (2, 4)}
    write_run(tmp_path / "run", {step: (params, {}) for step, params in states.items()}, adapter)
    main(ExportConfig(str(tmp_path / "run"), str(tmp_path / "model"), "last:2", merge=True))
    _, like = abstract_model(CONFIG, COMPUTE, mesh)
    written = flatten_dict(load_params(tmp_path / "model", like))
    flat = {step: flatten_dict(params) for step, params in states.items()}
    assert {path[-2] for path in written if (*path[:-1], "adapter", "magnitude") in flat[2]} == {
        "up_proj"
    }
    for path, kernel in written.items():
        if "up_proj" not in path:
            np.testing.assert_array_equal(kernel, flatten_dict(frozen)[path])
            continue
        merged = []
        for values in flat.values():
            A, B = (np.float64(values[*path[:-1], "adapter", side, "kernel"]) for side in "AB")
            updated = np.float64(values[path]) + adapter.scale * A @ B
            norms = np.linalg.norm(updated, axis=-2, keepdims=True)
            magnitude = values[*path[:-1], "adapter", "magnitude"][..., None, :]
            merged.append(updated / norms * magnitude)
        # Rounding of float32, of values about 1.
        np.testing.assert_allclose(kernel, np.mean(merged, axis=0), rtol=0, atol=3e-6)
    with pytest.raises(HymbaError, match="last:2 of adapters is no adapter of their rank"):
        ExportConfig(str(tmp_path / "run"), str(tmp_path / "adapter"), "last:2", adapter=True)
