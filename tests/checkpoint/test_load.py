"""Models from the directories of runs, and from those that hold a standalone model."""

import dataclasses
import inspect
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from inference.models import TINY, byte_tokenizer
from random_weights import random_weights

import hymba_jax
from hymba_jax.checkpoint.checkpoints import Checkpoints, LoopState, silence_orbax
from hymba_jax.checkpoint.load import load_model
from hymba_jax.checkpoint.model_file import model_toml, read_model
from hymba_jax.checkpoint.run_directory import write_run_directory
from hymba_jax.checkpoint.save import save_model
from hymba_jax.checkpoint.train_state import TrainState
from hymba_jax.config import ComputeConfig
from hymba_jax.config.data import DataConfig
from hymba_jax.config.run import RunConfig
from hymba_jax.errors import HymbaError
from hymba_jax.inference.loading import ModelChoice
from hymba_jax.model import unstack_layers
from hymba_jax.model.abstract import abstract_model
from hymba_jax.parallel.mesh import make_mesh

silence_orbax()

CONFIG = dataclasses.replace(TINY, layers="2*W", max_positions=64)


@pytest.fixture(scope="module")
def initial():
    return nnx.to_pure_dict(random_weights(CONFIG)[1])


def write_run(directory, compute, initial):
    """A run with checkpoints of steps 1 and 2."""
    data = DataConfig(tokenizer="bytes", sequence_length=24)
    run = RunConfig(output=str(directory), model=CONFIG, compute=compute, data=data)
    write_run_directory(run, byte_tokenizer())
    _, abstract = abstract_model(CONFIG, compute, make_mesh(jax.devices()[:1]))
    with Checkpoints(directory, keep=2) as checkpoints:
        for step in (1, 2):
            params = jax.tree.map(
                lambda a, like, k=step: (k * a).astype(like.dtype), initial, abstract
            )
            state = TrainState(params, {"count": jnp.int32(step)})
            checkpoints.save(state, LoopState(step, {}))
    return directory


@pytest.fixture(scope="module")
def run(tmp_path_factory, initial):
    return write_run(tmp_path_factory.mktemp("float32") / "run", ComputeConfig(), initial)


@pytest.fixture(scope="module")
def bfloat16_run(tmp_path_factory, initial):
    compute = ComputeConfig(dtype="bfloat16", param_dtype="bfloat16", remat="block")
    return write_run(tmp_path_factory.mktemp("bfloat16") / "run", compute, initial)


def generate(directory, **options):
    return hymba_jax.load(directory, **options).generate("the", max_new_tokens=12)


def params(model):
    return {path: np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(nnx.state(model))}


def test_the_package_alone_is_imported_quickly():
    script = """
import sys, hymba_jax
assert not {"jax", "flax", "orbax", "tokenizers"} & set(sys.modules)
assert hymba_jax.__all__ == ["__version__", "load"]
assert callable(hymba_jax.load)
assert "jax" in sys.modules
try:
    hymba_jax.lod
except AttributeError as error:
    assert "'lod'" in str(error)
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


def test_a_run_is_loaded_at_its_newest_step(run):
    newest, older = generate(run), generate(str(run), step=1)
    assert newest == generate(run, step=2)
    assert newest != older


def test_options_are_passed_on(run):
    choice = ModelChoice(str(run), step=1, batch_size=3, context=20, state_dtype="bfloat16")
    model = choice.load()
    assert (model.batch_size, model.engine.max_context) == (3, 20)
    read = model.engine.prefill([[1]], context=5)
    assert read.cache.layers[0].ssm.ssm_state.dtype == jnp.bfloat16
    assert read.cache.layers[0].kv.key.dtype == jnp.float32


def test_on_cpus_a_model_computes_in_float32(bfloat16_run):
    model = load_model(bfloat16_run)
    assert (model.compute.dtype, model.compute.param_dtype) == ("float32", "float32")
    assert model.compute.remat == "none"
    assert all(array.dtype == np.float32 for array in params(model).values())
    stored = params(load_model(bfloat16_run, dtype="bfloat16"))
    for path, array in params(model).items():
        np.testing.assert_array_equal(array, stored[path].astype(np.float32))


def test_elsewhere_it_computes_as_it_was_trained_to(bfloat16_run, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert load_model(bfloat16_run).compute.dtype == "bfloat16"


def test_float32_parameters_can_be_rounded(run):
    model = load_model(run, dtype="bfloat16")
    whole = params(load_model(run))
    small = {path[-1] for path, array in params(model).items() if array.dtype != jnp.bfloat16}
    assert small == {"A_log", "D", "dt_bias"}  # which stay as precise as they were
    for path, array in params(model).items():
        np.testing.assert_array_equal(array, whole[path].astype(array.dtype))


def test_a_saved_model_generates_as_its_run(run, tmp_path):
    saved = tmp_path / "models" / "mine"
    saved.parent.mkdir()
    save_model(saved, load_model(run), byte_tokenizer())
    names = {path.name for path in saved.iterdir()}
    assert names == {"config.toml", "params", "tokenizer.json", "tokenizer_config.json"}
    assert [path.name for path in saved.parent.iterdir()] == ["mine"]
    assert generate(saved) == generate(run)


def test_unrolled_layers_can_be_saved(run, tmp_path):
    """As a converter has them."""
    save_model(tmp_path / "apart", unstack_layers(load_model(run)), byte_tokenizer())
    assert read_model(tmp_path / "apart" / "config.toml")[1].scan_layers is False
    apart, stacked = (load_model(path) for path in (tmp_path / "apart", run))
    expected = params(unstack_layers(stacked))
    for name, array in params(apart).items():
        np.testing.assert_array_equal(array, expected.pop(name))
    assert not expected


def test_the_config_of_a_saved_model_is_that_of_the_model(tmp_path):
    compute = ComputeConfig(dtype="bfloat16", scan_layers=False)
    path = tmp_path / "config.toml"
    path.write_text(model_toml(CONFIG, compute))
    assert read_model(path) == (CONFIG, compute)
    assert [line for line in path.read_text().splitlines() if line.startswith("[")] == [
        "[model]",
        "[model.attention]",
        "[model.ssm]",
        "[compute]",
    ]


def test_an_existing_directory_is_not_overwritten(run, tmp_path):
    model = load_model(run)
    (tmp_path / "there").mkdir()
    with pytest.raises(HymbaError, match=r"there: exists already, choose another directory"):
        save_model(tmp_path / "there", model, byte_tokenizer())
    assert not list((tmp_path / "there").iterdir())


def test_a_model_is_saved_whole_or_not_at_all(run, tmp_path, monkeypatch):
    model = load_model(run)
    (tmp_path / "mine.partial").mkdir()  # somebody's own
    with monkeypatch.context() as patch:
        patch.setattr("hymba_jax.checkpoint.save.save_params", interrupt)
        with pytest.raises(KeyboardInterrupt):
            save_model(tmp_path / "mine", model, byte_tokenizer())
    assert [path.name for path in tmp_path.iterdir()] == ["mine.partial"]
    save_model(tmp_path / "mine", model, byte_tokenizer())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "mine.partial"]


def interrupt(*_args):
    raise KeyboardInterrupt


def lose(*names):
    def damage(directory):
        for name in names:
            path = directory / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    return damage


def widen(directory):
    path = directory / "config.toml"
    path.write_text(path.read_text().replace("mlp_size = 24", "mlp_size = 32"))


@pytest.mark.parametrize(
    ("damage", "step", "message"),
    [
        (lose("."), None, "{path}: no model found, there is no such directory"),
        (lose("config.toml"), None, "{path}: no model found, config.toml is missing"),
        (lose("checkpoints"), None, "{path}/checkpoints: no checkpoint; there is none"),
        (lose("checkpoints"), 3, "{path}/checkpoints: no checkpoint 3; there is none"),
        (lose(), 3, "{path}/checkpoints: no checkpoint 3; there are 1, 2"),
        (lose(), 0, "{path}/checkpoints: no checkpoint 0; there are 1, 2"),
        (
            lose("checkpoints/2/params"),
            None,
            "{path}/checkpoints/2: damaged, it has no params/_METADATA: restore it from a copy, or "
            "name another step (1)",
        ),
        (widen, None, "{path}/checkpoints/2/params: not parameters of this model that can be read"),
        (
            lose("tokenizer.json"),
            None,
            "{path}: the model has no tokenizer: put its tokenizer.json there",
        ),
    ],
)
def test_what_cannot_be_loaded(run, tmp_path, damage, step, message):
    path = tmp_path / "copy"
    shutil.copytree(run, path)
    damage(path)
    with pytest.raises(HymbaError) as caught:
        hymba_jax.load(path, step=step)
    assert str(caught.value).startswith(message.format(path=path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("directory", "options", "message"),
    [
        ("it", {"dtype": "fp16"}, 'dtype is \'fp16\', not "float32" or "bfloat16" or nothing'),
        (None, {}, "directory is None, not a path"),
    ],
)
def test_arguments_of_the_wrong_type(directory, options, message):
    """Without the tests' own checks of annotations, which refuse them first."""
    with pytest.raises(HymbaError) as caught:
        inspect.unwrap(hymba_jax.load)(directory, **options)
    assert str(caught.value) == message


def test_a_model_alone_has_no_steps(run, tmp_path):
    save_model(tmp_path / "alone", load_model(run), byte_tokenizer())
    with pytest.raises(HymbaError, match="no checkpoint 2; there is none"):
        hymba_jax.load(tmp_path / "alone", step=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0, not at least 1"),
        ({"context": 65}, "a context of 65 tokens: the model's is 1 to 64"),
    ],
)
def test_impossible_options(run, options, message):
    with pytest.raises(HymbaError, match=message):
        hymba_jax.load(run, **options)
