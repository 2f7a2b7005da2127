"""Runs that start from the parameters of a model or another run."""

import dataclasses
import shutil

import jax
import numpy as np
import pytest
from flax import nnx
from inference.models import TINY, byte_tokenizer, make_model

from hymba_jax.config import ComputeConfig
from hymba_jax.data.config import DataConfig
from hymba_jax.errors import HymbaError
from hymba_jax.inference.saving import save_model
from hymba_jax.model import arrange_layers
from hymba_jax.run_config import RunConfig, parse_run
from hymba_jax.sharding import make_mesh
from hymba_jax.training import loop
from hymba_jax.training.checkpoint import load_params
from hymba_jax.training.config import TrainingConfig
from hymba_jax.training.optimizer import make_optimizer
from hymba_jax.training.start import check_start, start_state
from hymba_jax.training.state import make_template

CONFIG = dataclasses.replace(TINY, layers="G 2*Ww G", max_positions=512)


@pytest.fixture(scope="module", params=[True, False], ids=["stacked", "apart"])
def held(request, tmp_path_factory):
    """A directory of a model, and the model."""
    model = arrange_layers(make_model(CONFIG), scan_layers=request.param)
    directory = tmp_path_factory.mktemp("held") / "model"
    save_model(directory, model, byte_tokenizer())
    return directory, model


@pytest.mark.parametrize("scan_layers", [True, False])
def test_the_state_has_the_parameters_and_a_new_optimizer(held, scan_layers):
    directory, model = held
    compute = ComputeConfig(scan_layers=scan_layers)
    run = RunConfig(init_from=str(directory), model=CONFIG, compute=compute)
    mesh = make_mesh(jax.devices()[:8])
    optimizer = make_optimizer(run.training)
    template = make_template(CONFIG, compute, optimizer, mesh)
    with jax.set_mesh(mesh):
        state = start_state(run, optimizer, template, mesh)
    assert jax.tree.map(lambda array: array.sharding, state) == template.shardings
    expected = nnx.to_pure_dict(nnx.state(arrange_layers(model, scan_layers=scan_layers)))
    jax.tree.map(np.testing.assert_array_equal, state.params, expected)
    assert all(not np.any(moment) for moment in jax.tree.leaves(state.optimizer))


def test_a_longer_context_may_be_trained(held):
    wide = dataclasses.replace(
        CONFIG,
        max_positions=1024,
        attention=dataclasses.replace(CONFIG.attention, window=32),
    )
    check_start(RunConfig(init_from=str(held[0]), model=wide))


def test_another_architecture_is_one_line(held):
    other = dataclasses.replace(CONFIG, mlp_size=48, num_meta_tokens=0)
    with pytest.raises(HymbaError) as caught:
        check_start(RunConfig(init_from=str(held[0]), model=other))
    assert str(caught.value) == (
        f"{held[0]}: its parameters do not fit this model (model.mlp_size is 24 there, 48 here; "
        "model.num_meta_tokens is 3 there, 0 here)"
    )


class TestCommandLine:
    def test_model_and_tokenizer_are_those_of_the_directory(self, held):
        directory = str(held[0])
        run, _ = parse_run(["--init-from", directory, "--model.max-positions", "1000"], "train.py")
        assert run.init_from == run.data.tokenizer == directory
        assert run.model == dataclasses.replace(CONFIG, max_positions=1000)

    def test_a_file_goes_before_them(self, held, tmp_path):
        path = tmp_path / "run.toml"
        path.write_text('data.tokenizer = "bytes"\nmodel.max_positions = 1000\n')
        run, _ = parse_run(["--init-from", str(held[0]), "--config", str(path)], "train.py")
        assert run.data.tokenizer == "bytes"
        assert run.model == dataclasses.replace(CONFIG, max_positions=1000)

    def test_without_a_tokenizer_there_it_is_the_usual_one(self, held, tmp_path):
        shutil.copyfile(held[0] / "config.toml", tmp_path / "config.toml")
        run, _ = parse_run(["--init-from", str(tmp_path)], "train.py")
        assert run.data == DataConfig()

    def test_a_directory_without_model(self, tmp_path):
        with pytest.raises(HymbaError, match="no model is here"):
            parse_run(["--init-from", str(tmp_path)], "train.py")
        (tmp_path / "config.json").touch()
        with pytest.raises(HymbaError, match="convert the released checkpoint first"):
            parse_run(["--init-from", str(tmp_path)], "train.py")


def test_a_run_starts_from_them_and_goes_on_without(tmp_path, monkeypatch):
    config = dataclasses.replace(CONFIG, layers="G")
    held = make_model(config)
    directory = tmp_path / "model"
    save_model(directory, held, byte_tokenizer())
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for i in range(8):
        (corpus / f"{i}.txt").write_text(f"the {i} old dogs and the red hats sat. " * 20)
    run = RunConfig(
        output=str(tmp_path / "run"),
        init_from=str(directory),
        model=config,
        data=DataConfig(str(corpus), tokenizer=str(directory), sequence_length=24),
        training=TrainingConfig(
            steps=1, batch_size=2, learning_rate=1e-9, min_learning_rate=0.0, sample_tokens=0
        ),
    )
    mesh = make_mesh(jax.devices()[:1])
    monkeypatch.setattr(loop, "make_mesh", lambda parallel: mesh)
    monkeypatch.setattr(loop, "init_state", None)  # nothing is drawn
    loop.train(run)
    template = make_template(config, ComputeConfig(), make_optimizer(run.training), mesh)
    params = load_params(run.output, template.state.params)
    expected = nnx.to_pure_dict(nnx.state(held))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6), params, expected)
    shutil.rmtree(directory)
    monkeypatch.setattr(loop, "compile_train_step", lambda *_: None)  # no step is left to do
    loop.train(run)
