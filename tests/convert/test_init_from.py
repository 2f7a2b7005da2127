"""Runs that start from the parameters of a model or another run."""

import dataclasses
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from golden_cases import GOLDEN
from inference.models import TINY, byte_tokenizer, make_model
from slow import slow_but

from hymba_jax.checkpoint.checkpoints import load_params
from hymba_jax.checkpoint.model_file import model_toml
from hymba_jax.checkpoint.save import save_model
from hymba_jax.checkpoint.train_state import abstract_train_state
from hymba_jax.config import ComputeConfig
from hymba_jax.config.data import DataConfig
from hymba_jax.config.run import RunConfig
from hymba_jax.config.training import TrainingConfig
from hymba_jax.convert.convert import ConvertConfig
from hymba_jax.convert.convert import main as convert
from hymba_jax.convert.init_from import read_config, read_initial_model
from hymba_jax.errors import HymbaError
from hymba_jax.model import stack_layers, unstack_layers
from hymba_jax.parallel.mesh import make_mesh
from hymba_jax.tokenizer import build_tokenizer
from hymba_jax.training import loop
from hymba_jax.training.arguments import names_model, parse_run
from hymba_jax.training.optimizer import make_optimizer

CONFIG = dataclasses.replace(TINY, layers="G 2*Ww", max_positions=512)


@pytest.fixture(scope="module", params=[stack_layers, unstack_layers])
def held(request, tmp_path_factory):
    """A directory of a model, and the model."""
    model = request.param(make_model(CONFIG))
    directory = tmp_path_factory.mktemp("held") / "model"
    save_model(directory, model, byte_tokenizer())
    return directory, model


@pytest.mark.parametrize("scan_layers", slow_but([True, False], True))
def test_the_state_has_the_parameters_and_a_new_optimizer(held, scan_layers):
    directory, model = held
    compute = ComputeConfig(scan_layers=scan_layers)
    mesh = make_mesh(jax.devices()[:8])
    optimizer = make_optimizer(TrainingConfig())
    abstract = abstract_train_state(CONFIG, compute, optimizer, mesh)
    with jax.set_mesh(mesh):
        initial = read_initial_model(str(directory))
        state = initial.load_state(CONFIG, compute, optimizer, abstract, mesh, seed=0)
    assert jax.tree.map(lambda array: array.sharding, state) == abstract.shardings
    relayout = stack_layers if scan_layers else unstack_layers
    expected = nnx.to_pure_dict(nnx.state(relayout(model)))
    jax.tree.map(np.testing.assert_array_equal, state.params, expected)
    for path, moment in jax.tree.leaves_with_path(state.optimizer):
        assert "learning_rate" in jax.tree_util.keystr(path) or not np.any(moment)


def test_a_longer_context_may_be_trained(held):
    wide = dataclasses.replace(
        CONFIG,
        max_positions=1024,
        attention=dataclasses.replace(CONFIG.attention, window=32),
    )
    read_initial_model(str(held[0])).check_model(wide)


def test_what_else_differs_is_said(held):
    directory = str(held[0])
    attention = dataclasses.replace(CONFIG.attention, rope_theta=5e5)
    other = dataclasses.replace(CONFIG, attention=attention, vocab_size="auto")
    initial = read_initial_model(directory)
    assert initial.describe(CONFIG) == f"initialized from {directory}"
    assert "model.attention.rope_theta is 10000.0 there, 500000.0 here" in initial.describe(other)


def test_another_architecture_is_one_line(held):
    other = dataclasses.replace(CONFIG, mlp_size=48, num_meta_tokens=0)
    with pytest.raises(HymbaError) as caught:
        read_initial_model(str(held[0])).check_model(other)
    assert str(caught.value) == (
        f"{held[0]}: its parameters do not fit this model (model.mlp_size is 24 there, 48 here; "
        "model.num_meta_tokens is 3 there, 0 here): leave these fields out of the config's "
        "[model], or start from another model"
    )


class TestTokenizer:
    """Whether the ids that the run's tokenizer makes are those that the model knows."""

    TEXTS = ("the cat sat on the mat, the cat sat", "another mat for another cat")

    @pytest.fixture
    def directory(self, tmp_path):
        build_tokenizer("bpe:270", self.TEXTS).save(tmp_path)
        (tmp_path / "config.toml").write_text(model_toml(CONFIG, ComputeConfig()))
        return tmp_path

    @pytest.fixture
    def initial(self, directory):
        return read_initial_model(str(directory))

    def test_one_trained_on_other_text_is_refused(self, initial, directory):
        other = build_tokenizer("bpe:270", ["zebras graze, zebras gaze"])
        with pytest.raises(HymbaError) as caught:
            initial.check_tokenizer(other, "bpe:270")
        assert str(caught.value) == (
            f"{directory}: its embeddings belong to the ids of its own tokenizer, data.tokenizer "
            f"bpe:270 has different ones: use --data.tokenizer {directory}, or train without "
            "init_from"
        )

    def test_bytes_in_place_of_merges_are_refused(self, initial):
        tokenizer = build_tokenizer("bytes", ())
        with pytest.raises(HymbaError, match=r"data\.tokenizer bytes has different ones"):
            initial.check_tokenizer(tokenizer, "bytes")

    def test_its_own_in_any_form_is_used(self, initial, directory):
        for name in ("bpe:270", str(directory), str(directory / "tokenizer.json")):
            initial.check_tokenizer(build_tokenizer(name, self.TEXTS), name)

    def test_its_own_is_kept_where_another_would_be_trained(self, initial, directory):
        kept = initial.tokenizer_for(DataConfig(tokenizer="bpe:4096"))
        own = build_tokenizer(str(directory), ())
        assert kept.model.to_str() == own.model.to_str()
        assert initial.tokenizer_for(DataConfig(tokenizer="bytes")) is None

    def test_more_tokens_at_the_end_are_none_of_other_meaning(self, initial):
        larger = build_tokenizer("bpe:270", self.TEXTS)
        larger.model.add_special_tokens(["<|user|>"])
        initial.check_tokenizer(larger, "bpe:270")

    def test_a_model_without_tokenizer_has_none_to_compare_with(self, directory):
        for file in ("tokenizer.json", "tokenizer_config.json"):
            (directory / file).unlink()
        initial = read_initial_model(str(directory))
        initial.check_tokenizer(build_tokenizer("bytes", ()), "bytes")
        assert initial.tokenizer_for(DataConfig(tokenizer="bpe:4096")) is None


class TestCommandLine:
    def test_model_and_tokenizer_are_those_of_the_directory(self, held):
        directory = str(held[0])
        run, _ = parse_run(["--init-from", directory, "--model.max-positions", "1000"], "train.py")
        assert run.init_from == run.data.tokenizer == directory
        assert run.model == dataclasses.replace(CONFIG, max_positions=1000)

    def test_an_underscore_is_as_good_as_a_dash(self, held):
        runs = [
            parse_run([name, str(held[0])], "train.py") for name in ("--init-from", "--init_from")
        ]
        assert runs[0] == runs[1]

    def test_a_file_goes_before_them(self, held, tmp_path):
        path = tmp_path / "run.toml"
        path.write_text('data.tokenizer = "bytes"\nmodel.max_positions = 1000\n')
        run, _ = parse_run(["--init-from", str(held[0]), "--config", str(path)], "train.py")
        assert run.data.tokenizer == "bytes"
        assert run.model == dataclasses.replace(CONFIG, max_positions=1000)

    def test_a_file_may_name_the_directory(self, held, tmp_path):
        directory, path = str(held[0]), tmp_path / "run.toml"
        path.write_text(f'init_from = "{directory}"\ntraining.steps = 3\n')
        run, _ = parse_run(["--config", str(path)], "train.py")
        assert names_model(["--config", str(path)])
        given, _ = parse_run(["--init-from", directory, "--training.steps", "3"], "train.py")
        assert run == given
        path.write_text(path.read_text() + "model.max_positions = 1000\n")
        run, _ = parse_run(["--config", str(path)], "train.py")
        assert run.model == dataclasses.replace(CONFIG, max_positions=1000)
        # As the config of a run, which has its model itself:
        path.write_text(given.to_toml().replace(directory, "gone"))
        run, _ = parse_run(["--config", str(path)], "train.py")
        assert (run.model, Path(run.init_from).name) == (given.model, "gone")

    def test_without_a_tokenizer_there_it_is_the_usual_one(self, held, tmp_path):
        shutil.copyfile(held[0] / "config.toml", tmp_path / "config.toml")
        run, _ = parse_run(["--init-from", str(tmp_path)], "train.py")
        assert run.data == DataConfig()

    def test_a_directory_without_model(self, tmp_path):
        with pytest.raises(HymbaError, match=r"no model found.* by --config OUTPUT/config\.toml$"):
            parse_run(["--init-from", str(tmp_path)], "train.py")
        (tmp_path / "adapter_config.json").write_text("{}")
        with pytest.raises(HymbaError, match="is missing: it is an adapter, generate with"):
            parse_run(["--init-from", str(tmp_path)], "train.py")
        (tmp_path / "config.json").write_text("{}")
        with pytest.raises(HymbaError, match=r"^[^:]*/config\.json: [^:]* is missing"):
            parse_run(["--init-from", str(tmp_path)], "train.py")

    def test_an_hf_checkpoint_says_what_the_model_is(self):
        run, _ = parse_run(["--init-from", str(GOLDEN / "tiny-ntk")], "train.py")
        assert run.model.num_layers == 7


def test_an_hf_checkpoint_needs_no_conversion(tmp_path):
    """Its parameters are those of its conversion, bit for bit, also sharded and stacked."""
    directory, mesh = GOLDEN / "tiny-ntk", make_mesh(jax.devices()[:8])
    convert(ConvertConfig(str(directory), str(tmp_path / "native")))
    config, optimizer = read_config(str(directory)), make_optimizer(TrainingConfig())
    abstract = abstract_train_state(config, ComputeConfig(), optimizer, mesh)
    states = []
    for source in (directory, tmp_path / "native"):
        initial = read_initial_model(str(source))
        initial.check_model(config)
        with jax.set_mesh(mesh):
            states.append(
                initial.load_state(config, ComputeConfig(), optimizer, abstract, mesh, seed=0)
            )
    first, second = (state.params for state in states)
    jax.tree.map(np.testing.assert_array_equal, first, second)
    assert jax.tree.map(lambda array: array.sharding, first) == abstract.shardings.params


def test_a_run_starts_from_them_and_resumes_without(tmp_path, monkeypatch):
    config = dataclasses.replace(CONFIG, layers="A")
    held = make_model(config)
    directory = tmp_path / "model"
    save_model(directory, held, byte_tokenizer())
    (directory / "config.json").write_text("{}")  # as if it came from an HF checkpoint
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
    monkeypatch.setattr(loop, "init_state", None)  # nothing is initialized
    loop.train(run, generate=lambda *_: "")
    optimizer = make_optimizer(run.training)
    abstract = abstract_train_state(config, ComputeConfig(), optimizer, mesh)
    params = load_params(run.output, abstract.state.params)
    expected = nnx.to_pure_dict(nnx.state(held))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6), params, expected)
    shutil.rmtree(directory)
    monkeypatch.setattr(loop, "compile_stage", pytest.fail)  # no step is left
    loop.train(run, generate=lambda *_: "")
    assert (tmp_path / "run" / "hf_files" / "config.json").read_text() == "{}"
