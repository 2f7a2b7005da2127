"""HF checkpoints to native ones and back: every bit, the config and all other files are kept."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import safetensors
import tokenizers
from convert.hf import (
    AUTO_MAP,
    COMPANIONS,
    assert_same_bits,
    convert,
    golden_config,
    golden_weights,
    random_bits,
    read_hf,
    write_hf,
)
from flax import nnx
from golden_cases import CASES, GOLDEN
from inference.models import TINY, byte_tokenizer, make_model
from slow import slow_but
from tokenizers.processors import TemplateProcessing

from hymba_jax import cli
from hymba_jax.checkpoint.checkpoints import Checkpoints, LoopState, silence_orbax
from hymba_jax.checkpoint.load import load_model
from hymba_jax.checkpoint.model_file import read_model
from hymba_jax.checkpoint.run_directory import write_run_directory
from hymba_jax.checkpoint.save import save_model
from hymba_jax.checkpoint.train_state import TrainState
from hymba_jax.config import ComputeConfig
from hymba_jax.config.data import DataConfig
from hymba_jax.config.run import RunConfig
from hymba_jax.convert.convert import parse_size
from hymba_jax.convert.hf_config import config_from_hf
from hymba_jax.convert.hf_tokenizer import write_hf_tokenizer
from hymba_jax.convert.mapping import EMBEDDING, HEAD
from hymba_jax.errors import HymbaError
from hymba_jax.hf_files import keep_hf_files
from hymba_jax.inference.generation_config import read_generation_defaults
from hymba_jax.model import Hymba, stack_layers, unstack_layers
from hymba_jax.tokenizer import Tokenizer

silence_orbax()


@pytest.fixture(scope="module")
def hf(tmp_path_factory):
    directory = write_hf(tmp_path_factory.mktemp("golden") / "hf")
    for name, content in COMPANIONS.items():
        (directory / name).write_bytes(content)
    return directory


@pytest.fixture(scope="module")
def native(hf, tmp_path_factory):
    return convert(hf, tmp_path_factory.mktemp("converted") / "native")


def files(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}


def params(model):
    return {path: np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(nnx.state(model))}


@pytest.mark.parametrize("case", slow_but(CASES, "tiny-nometa"))
def test_golden_logits_in_both_directions(case, tmp_path, capsys):
    hf = write_hf(tmp_path / "hf", case=case)
    verify = str(GOLDEN / case / "golden.npz")
    native = convert(hf, tmp_path / "native", verify=verify)
    back = convert(native, tmp_path / "back", verify=verify)
    reports = [line for line in capsys.readouterr().out.splitlines() if "logits: max" in line]
    assert len(reports) == 2
    assert all("top-1 agreement 100.00%" in line for line in reports)
    assert_same_bits(read_hf(back), golden_weights(case))
    assert (back / "config.json").read_bytes() == (hf / "config.json").read_bytes()


def test_everything_else_comes_back_byte_for_byte(hf, native, tmp_path):
    back = files(convert(native, tmp_path / "back"))
    before = files(hf)
    assert back.keys() == before.keys() | {".hymba_convert.json"}
    for name in before.keys() - {"model.safetensors"}:
        assert back[name] == before[name]


def test_a_checkpoint_without_tokenizer_is_converted_with_a_warning(tmp_path, capsys):
    convert(write_hf(tmp_path / "hf"), tmp_path / "native")
    assert "warning: no tokenizer.json: commands that take or write text need one" in (
        capsys.readouterr().out
    )


def test_the_directory_is_one_of_a_model_alone(native):
    assert {path.name for path in native.iterdir()} == {
        *("config.toml", "params", "config.json", ".hymba_convert.json"),
        *COMPANIONS,
    }
    config, compute = read_model(native / "config.toml")
    assert config == config_from_hf(golden_config())
    assert compute == ComputeConfig(scan_layers=False)
    expected = golden_weights()
    model = load_model(native)
    np.testing.assert_array_equal(model.embedding[...], expected[EMBEDDING])


@pytest.mark.parametrize(
    "dtypes",
    [
        {"": "bfloat16"},
        {"": "float16"},
        {"": "float32"},
        {"": "bfloat16", "A_log": "float32", "norm": "float16", "layers.3": "float32"},
    ],
    ids=lambda dtypes: "-".join(dtypes.values()),
)
def test_any_bits_survive_in_any_dtype(dtypes, tmp_path, capsys):
    weights = random_bits(golden_weights(), dtypes)
    hf = write_hf(tmp_path / "hf", weights)
    native = convert(hf, tmp_path / "native")
    assert f"warning: {EMBEDDING} has" in capsys.readouterr().out
    back = convert(native, tmp_path / "back")
    assert f"warning: {EMBEDDING} has" in capsys.readouterr().out
    assert_same_bits(read_hf(back), weights)


def test_zeros_are_stored(tmp_path):
    weights = golden_weights()
    name = "model.layers.2.mamba.conv1d.bias"
    weights[name] = np.zeros_like(weights[name])
    native = convert(write_hf(tmp_path / "hf", weights), tmp_path / "native")
    assert_same_bits(read_hf(convert(native, tmp_path / "back")), weights)


def test_orbax_restores_what_was_written_by_itself(native):
    with ocp.StandardCheckpointer() as checkpointer:
        tree = checkpointer.restore((native / "params").absolute())
    np.testing.assert_array_equal(tree["embedding"], golden_weights()[EMBEDDING])


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        ({"": "bfloat16"}, "bfloat16"),
        ({"": "bfloat16", "A_log": "float32"}, "bfloat16"),
        ({"": "bfloat16", "up_proj": "float32"}, "float32"),
        ({"": "float16"}, "float32"),
    ],
)
def test_the_model_computes_in_a_dtype_that_loses_nothing(dtypes, expected, tmp_path):
    weights = random_bits(golden_weights(), dtypes)
    native = convert(write_hf(tmp_path / "hf", weights), tmp_path / "native")
    compute = read_model(native / "config.toml")[1]
    assert (compute.dtype, compute.param_dtype) == (expected, expected)
    loaded = load_model(native, dtype=expected).embedding[...]
    assert loaded.dtype == expected
    np.testing.assert_array_equal(
        loaded.astype("float32"),
        weights[EMBEDDING].astype("float32"),  # NaN equals NaN in these
    )


def test_numbers_that_are_not_finite_are_counted(tmp_path, capsys):
    weights = golden_weights()
    weights["model.layers.2.mamba.D.0"][:3] = np.nan, np.inf, -np.inf
    convert(write_hf(tmp_path / "hf", weights), tmp_path / "native")
    out = capsys.readouterr().out
    assert "warning: model.layers.2.mamba.D.0 has 3 numbers that are NaN or infinite" in out
    assert out.count("NaN") == 1


def test_a_dtype_changes_when_asked_for_and_is_reported(hf, tmp_path, capsys):
    native = convert(hf, tmp_path / "native", dtype="bfloat16")
    assert "numbers in cast from float32 to bfloat16, as requested" in capsys.readouterr().out
    expected = {name: a.astype("bfloat16") for name, a in golden_weights().items()}
    back = convert(native, tmp_path / "back")
    assert_same_bits(read_hf(back), expected)
    assert json.loads((back / "config.json").read_text()) == {
        **golden_config(),
        "torch_dtype": "bfloat16",
    }
    wide = convert(native, tmp_path / "wide", dtype="float32")
    assert_same_bits(read_hf(wide), {name: a.astype("float32") for name, a in expected.items()})
    assert json.loads((wide / "config.json").read_text())["torch_dtype"] == "float32"


class TestTiedHead:
    def test_an_equal_copy_is_kept_once_and_comes_back(self, tmp_path, capsys):
        weights = golden_weights()
        weights[HEAD] = weights[EMBEDDING].copy()
        weights[EMBEDDING][0, 0] = weights[HEAD][0, 0] = np.nan
        native = convert(write_hf(tmp_path / "hf", weights), tmp_path / "native")
        assert f"{HEAD} equals {EMBEDDING}" in capsys.readouterr().out
        assert_same_bits(read_hf(convert(native, tmp_path / "back")), weights)

    def test_it_may_be_all_that_was_kept(self, tmp_path, capsys):
        weights = golden_weights()
        weights[HEAD] = weights.pop(EMBEDDING)
        hf = write_hf(tmp_path / "hf", weights)
        native = convert(hf, tmp_path / "native")
        assert f"{HEAD} is read as {EMBEDDING}" in capsys.readouterr().out
        assert_same_bits(read_hf(convert(native, tmp_path / "back")), golden_weights())

    def test_a_different_one_is_refused_with_advice(self, tmp_path):
        weights = golden_weights()
        weights[HEAD] = weights[EMBEDDING].copy()
        weights[HEAD][-1, -1] += 1
        hf = write_hf(tmp_path / "hf", weights)
        with pytest.raises(HymbaError, match=r"differs from .*set tie_word_embeddings to false"):
            convert(hf, tmp_path / "native")
        assert [path.name for path in tmp_path.iterdir()] == ["hf"]

    def test_untied_it_is_a_tensor_of_its_own(self, tmp_path):
        weights = golden_weights()
        weights[HEAD] = 2 * weights[EMBEDDING]
        hf = write_hf(tmp_path / "hf", weights, tie_word_embeddings=False)
        native = convert(hf, tmp_path / "native")
        np.testing.assert_array_equal(load_model(native).lm_head.kernel[...], weights[HEAD].T)
        assert_same_bits(read_hf(convert(native, tmp_path / "back")), weights)

    def test_untied_and_absent_it_is_missing(self, tmp_path):
        hf = write_hf(tmp_path / "hf", tie_word_embeddings=False)
        with pytest.raises(HymbaError, match=f"{HEAD} is missing"):
            convert(hf, tmp_path / "native")


class TestShards:
    def test_files_are_small_named_and_indexed_as_transformers_does(self, native, tmp_path):
        back = convert(native, tmp_path / "back", max_shard_size="100KB")
        index = json.loads((back / "model.safetensors.index.json").read_text())
        names = sorted(path.name for path in back.glob("*.safetensors"))
        count = len(names)
        assert count > 3
        assert names == [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
        weights = golden_weights()
        assert index["metadata"]["total_size"] == sum(a.nbytes for a in weights.values())
        for name in names:
            with safetensors.safe_open(back / name, "np") as file:
                assert file.metadata() == {"format": "pt"}
                held = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            size = sum(array.nbytes for array in held.values())
            assert size <= 100_000 or len(held) == 1
            assert {key for key, file in index["weight_map"].items() if file == name} == {*held}
        assert_same_bits(read_hf(back), weights)
        again = convert(back, tmp_path / "again")
        assert_same_bits(read_hf(convert(again, tmp_path / "whole")), weights)

    @pytest.mark.parametrize(
        ("text", "size"), [("5GB", 5 * 10**9), ("2GiB", 2**31), ("1.5 mb", 1500000), ("7", 7)]
    )
    def test_sizes(self, text, size):
        assert parse_size(text) == size

    @pytest.mark.parametrize("text", ["", "big", "0", "-1GB", "5TB", "9" * 400, "9" * 5000 + "GB"])
    def test_what_is_no_size(self, text, native, tmp_path):
        with pytest.raises(HymbaError, match="not a size such as") as caught:
            convert(native, tmp_path / "back", max_shard_size=text)
        assert len(str(caught.value)) < 150


CONFIG = dataclasses.replace(TINY, layers="G 2*Ww G")


@pytest.fixture(scope="module")
def model():
    return stack_layers(make_model(CONFIG))


class TestModelsTrainedHere:
    """Native to HF and back, with scanned layers."""

    def test_a_model_alone(self, model, tmp_path, capsys):
        save_model(tmp_path / "mine", model, byte_tokenizer())
        hf = convert(tmp_path / "mine", tmp_path / "hf")
        config = json.loads((hf / "config.json").read_text())
        assert config_from_hf(config).resolved() == CONFIG.resolved()
        assert (config["model_type"], config["torch_dtype"]) == ("hymba", "float32")
        again = convert(hf, tmp_path / "again")
        expected = params(unstack_layers(model))
        held = params(load_model(again))
        assert held.keys() == expected.keys()
        for path, array in expected.items():
            np.testing.assert_array_equal(held[path], array)
        tokenizer = Tokenizer.load(again)
        assert tokenizer.encode("a <s> b") == byte_tokenizer().encode("a <s> b")
        assert (tokenizer.bos, tokenizer.eos) == ("<s>", "</s>")
        # The whole prompt, with the token that begins it, as transformers 4.57.6 and 5.24.0 have
        # it: AutoTokenizer.from_pretrained(hf)("the cat").input_ids
        exported = tokenizers.Tokenizer.from_file(str(hf / "tokenizer.json"))
        assert exported.encode("the cat").ids == [1, 86, 74, 71, 223, 69, 67, 86]
        settings = json.loads((hf / "tokenizer_config.json").read_text())
        assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
        assert settings["pad_token"] == "<pad>"
        said = capsys.readouterr().out
        assert "warning: transformers cannot load it: config.json has no auto_map" in said
        assert said.count("auto_map to the") == 1

    def test_a_run_at_any_step(self, model, tmp_path):
        data = DataConfig(tokenizer="bytes", sequence_length=24)
        run = RunConfig(output=str(tmp_path / "run"), model=CONFIG, data=data)
        write_run_directory(run, byte_tokenizer())
        tree = nnx.to_pure_dict(nnx.state(model))
        with Checkpoints(tmp_path / "run", keep=2) as checkpoints:
            for step in (1, 2):
                scaled = jax.tree.map(lambda a, k=step: k * a, tree)
                state = TrainState(scaled, {"count": jnp.int32(step)})
                checkpoints.save(state, LoopState(step, {}))
        newest = read_hf(convert(tmp_path / "run", tmp_path / "newest"))
        older = read_hf(convert(tmp_path / "run", tmp_path / "older", step=1))
        np.testing.assert_array_equal(newest[EMBEDDING], 2 * older[EMBEDDING])
        kernel = model.groups[1].group.blocks[0].mlp.up_proj.kernel[...]
        for unit, layer in enumerate((1, 3)):
            name = f"model.layers.{layer}.moe.experts.0.up_proj.weight"
            np.testing.assert_array_equal(older[name], kernel[unit].T)

    def test_a_run_that_started_from_a_hf_checkpoint(self, tmp_path):
        """Everything but weights and config comes back, though the run saves a tokenizer itself."""
        started = write_hf(tmp_path / "hf", auto_map=AUTO_MAP, eos_token_id=[2, 5])
        Tokenizer(byte_tokenizer().model, "<s>", "</s>").save(started)
        text = json.dumps(json.loads((started / "tokenizer.json").read_text()), indent=7)
        (started / "tokenizer.json").write_text(text)
        (started / "tokenizer_config.json").write_text(
            '{"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "LlamaTokenizer"}'
        )
        for name in ("special_tokens_map.json", "added_tokens.json"):
            (started / name).write_text("{ }")
        (started / "generation_config.json").write_text('{"eos_token_id": [2, 5]}')
        for name in ("configuration_hymba.py", "modeling_hymba.py"):
            (started / name).write_text(f"# {name}\n")
        native = convert(started, tmp_path / "native")

        config, compute = read_model(native / "config.toml")
        run = RunConfig(
            output=str(tmp_path / "run"),
            init_from=str(native),
            model=config,
            compute=compute,
            data=DataConfig(tokenizer=str(native), sequence_length=24),
        )
        for resumed in (False, True):  # the tokenizer is saved again
            write_run_directory(run, Tokenizer.load(run.output if resumed else native))
            if not resumed:
                keep_hf_files(run.init_from, run.output)
        tree = nnx.to_pure_dict(nnx.state(load_model(native)))
        with Checkpoints(tmp_path / "run", keep=1) as checkpoints:
            checkpoints.save(TrainState(tree, {"count": jnp.int32(1)}), LoopState(1, {}))
        assert read_generation_defaults(tmp_path / "run").eos_token_ids == (2, 5)

        before, back = files(started), files(convert(tmp_path / "run", tmp_path / "back"))
        del back[".hymba_convert.json"], back["model.safetensors"], before["model.safetensors"]
        assert back == before
        assert_same_bits(read_hf(tmp_path / "back"), golden_weights())
        cli.inspect([str(tmp_path / "back")], "hymba inspect")

    def test_a_run_in_another_dtype_than_the_hf_checkpoint(self, tmp_path):
        """config.json has the dtype of the weights that are written."""
        started = write_hf(tmp_path / "hf")
        run = convert(started, tmp_path / "run", dtype="bfloat16")
        keep_hf_files(str(started), str(run))
        (run / "config.json").unlink()
        back = convert(run, tmp_path / "back")
        settings = json.loads((back / "config.json").read_text())
        assert settings == {**golden_config(), "torch_dtype": "bfloat16"}
        assert {str(array.dtype) for array in read_hf(back).values()} == {"bfloat16"}

    def test_a_tokenizer_without_bos(self, tmp_path):
        tokenizer = Tokenizer(byte_tokenizer().model, None, "</s>")
        # Ends every text, which no prompt for this model does.
        tokenizer.model.post_processor = TemplateProcessing(
            single="$A </s>", pair="$A </s> $B", special_tokens=[("</s>", tokenizer.eos_id)]
        )
        write_hf_tokenizer(tokenizer, CONFIG, tmp_path)
        exported = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
        assert exported.encode("the cat").ids == [86, 74, 71, 223, 69, 67, 86]

    def test_another_tokenizer_than_that_of_the_hf_checkpoint(self, native, tmp_path, capsys):
        run = shutil.copytree(native, tmp_path / "run")
        keep_hf_files(str(native), str(run))
        (run / "config.json").unlink()
        byte_tokenizer().save(run)
        byte_tokenizer().save(run / "hf_files")
        (run / "hf_files" / "tokenizer_config.json").write_text('{"bos_token": "<pad>"}')
        back = convert(run, tmp_path / "back")
        assert "the tokenizer differs from that" in capsys.readouterr().out
        assert json.loads((back / "tokenizer_config.json").read_text())["bos_token"] == "<s>"
        assert not (back / "special_tokens_map.json").exists()
        assert (back / "generation_config.json").exists()

    def test_what_config_toml_changes_is_in_config_json(self, native, tmp_path):
        edited = shutil.copytree(native, tmp_path / "edited")
        toml = (edited / "config.toml").read_text()
        (edited / "config.toml").write_text(toml.replace("window = 6", "window = 7"))
        settings = json.loads((convert(edited, tmp_path / "back") / "config.json").read_text())
        assert settings["sliding_window"] == 7
        assert golden_config()["sliding_window"] == 6
        assert settings.keys() >= golden_config().keys()
        assert settings["router_aux_loss_coef"] == golden_config()["router_aux_loss_coef"]

    def test_an_architecture_that_hf_checkpoints_do_not_have(self, tmp_path):
        config = dataclasses.replace(TINY, layers="G M")
        model = Hymba(config, ComputeConfig(), nnx.Rngs(0))
        save_model(tmp_path / "mine", model, byte_tokenizer())
        with pytest.raises(HymbaError, match="the HF implementation has only attention and Mamba"):
            convert(tmp_path / "mine", tmp_path / "hf")
