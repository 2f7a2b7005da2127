"""What `hymba inspect` says of checkpoints of either kind."""

import json
import re
import shutil

import jax
import jax.numpy as jnp
import pytest
import safetensors.numpy
from convert.hf import AUTO_MAP, convert, golden_config, golden_weights, write_hf
from flax import nnx
from golden_cases import GOLDEN
from inference.models import TINY, make_model

from hymba_jax import cli
from hymba_jax.checkpoint.checkpoints import Checkpoints, LoopState
from hymba_jax.checkpoint.load import load_model
from hymba_jax.checkpoint.model_file import model_toml, read_model_directory
from hymba_jax.checkpoint.train_state import TrainState
from hymba_jax.config import PRESETS
from hymba_jax.convert.inspect import count_by_part
from hymba_jax.convert.native_checkpoint import NativeCheckpoint
from hymba_jax.errors import HymbaError


@pytest.fixture(scope="module")
def hf(tmp_path_factory):
    """With all that transformers needs, which is not read."""
    directory = write_hf(tmp_path_factory.mktemp("inspected") / "hf", auto_map=AUTO_MAP)
    for name in ("configuration_hymba.py", "modeling_hymba.py", "tokenizer.json"):
        (directory / name).write_text("")
    (directory / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    return directory


def inspect(path, capsys):
    cli.inspect([str(path)], "hymba inspect")
    return " ".join(capsys.readouterr().out.split())


def test_both_kinds_hold_the_same(hf, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    native = convert(hf, tmp_path / "native")
    capsys.readouterr()
    of_hf, of_native = inspect(hf, capsys), inspect(native, capsys)
    for text in (of_hf, of_native):
        assert "10: G 2*Ww G Www G" in text
        assert "│ parameters │ 310,574" in text
        assert "1.2 MB" in text
        assert "│ complete │ yes" in text
    assert f"float32 │ {len(golden_weights())} tensors" in of_hf
    assert "│ form │ HF" in of_hf
    assert "│ form │ native" in of_native
    (native / "tokenizer.json").unlink()
    without = inspect(native, capsys)
    assert "│ tokenizer │ no tokenizer.json: commands that take or write text need one │" in without
    assert "│ complete │ yes, but for a tokenizer │" in without


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / "modeling_hymba.py").unlink(), "modeling_hymba.py is missing"),
        (lambda d: (d / "configuration_hymba.py").unlink(), "configuration_hymba.py is missing"),
        (
            lambda d: (d / "config.json").write_text(
                json.dumps(golden_config() | {"auto_map": AUTO_MAP | {"AutoConfig": 1}})
            ),
            "has no auto_map to the HF implementation for AutoConfig",
        ),
        (lambda d: (d / "tokenizer.json").unlink(), "tokenizer.json is missing"),
        (lambda d: (d / "tokenizer_config.json").write_text("{}"), "has no tokenizer_class"),
    ],
)
def test_what_transformers_lacks_is_said(damage, message, hf, tmp_path, capsys):
    copy = shutil.copytree(hf, tmp_path / "copy")
    damage(copy)
    with pytest.raises(SystemExit) as caught:
        inspect(copy, capsys)
    assert "transformers cannot load it: " in caught.value.code
    assert message in caught.value.code
    assert "yes" not in capsys.readouterr().out


def test_a_model_without_code_for_transformers_is_complete(hf, tmp_path, capsys, monkeypatch):
    """As all that were trained here."""
    monkeypatch.setenv("COLUMNS", "250")
    copy = shutil.copytree(hf, tmp_path / "copy")
    (copy / "config.json").write_text(json.dumps(golden_config()))
    printed = inspect(copy, capsys)
    assert "│ complete │ yes, but for transformers' code │" in printed
    assert (
        "│ transformers │ config.json has no auto_map to the HF implementation: put "
        "configuration_hymba.py and modeling_hymba.py beside it, and an auto_map that names them "
        "into it │"
    ) in printed


def test_a_path_is_no_markup(hf, tmp_path, capsys):
    copy = shutil.copytree(hf, tmp_path / "[red]a\x1b[0mb")
    out = inspect(copy, capsys)
    assert "[red]a" in out.replace(" ", "")
    assert "\x1b" not in out


def test_parts_of_the_1_5b_are_all_of_it():
    parts = count_by_part(PRESETS["hymba-1.5b"])
    expected = json.loads((GOLDEN / "hymba_1p5b_params.json").read_text())
    assert parts.total() == expected["total"]
    assert parts["embedding"] == 32001 * 1600
    assert parts["MLP"] == 32 * 3 * 1600 * 5504
    assert parts["meta tokens"] == 128 * 1600


def test_what_is_missing_is_said(tmp_path, capsys):
    weights = golden_weights()
    del weights["model.layers.3.mamba.D.0"]
    hf = write_hf(tmp_path / "hf", weights)
    with pytest.raises(SystemExit) as caught:
        inspect(hf, capsys)
    assert "not a complete checkpoint: model.layers.3.mamba.D.0 is missing" in caught.value.code
    assert re.search(r"complete\W+no", capsys.readouterr().out)


def test_another_dtype_is_said(tmp_path, capsys):
    weights = golden_weights()
    weights["model.layers.3.mamba.D.0"] = weights["model.layers.3.mamba.D.0"].astype("float64")
    safetensors.numpy.save_file(weights, write_hf(tmp_path / "r") / "model.safetensors")
    with pytest.raises(SystemExit) as caught:
        inspect(tmp_path / "r", capsys)
    assert "has dtype F64" in caught.value.code


def test_a_directory_without_checkpoint(tmp_path, capsys):
    gone, corpus = tmp_path / "gone", tmp_path / "corpus"
    corpus.mkdir()
    for name in ("manifest.json", "tokenizer.json"):
        (corpus / name).write_text("{}")
    for directory, reason in (
        (tmp_path, "neither config.toml (native) nor config.json (HF)"),
        (gone, "there is no such directory"),
        (corpus, f"it is a tokenized corpus: hymba tokenize --check --output {corpus} reads it"),
    ):
        with pytest.raises(SystemExit) as caught:
            inspect(directory, capsys)
        assert caught.value.code == f"error: {directory}: no checkpoint found, {reason}"
    with pytest.raises(HymbaError, match="no model found, it is a tokenized corpus: hymba token"):
        read_model_directory(corpus)


def test_a_flipped_bit_is_found_wherever_arrays_are_read(hf, tmp_path, capsys):
    native = convert(hf, tmp_path / "native")
    name = "groups.1.blocks.0.mixer.ssm.D"
    (file,) = (path for path in (native / "params").glob("*.ssm.D/0*") if path.parent.name == name)
    content = bytearray(file.read_bytes())
    content[8] ^= 1  # the lowest bit of the third number
    file.write_bytes(content)
    capsys.readouterr()
    message = f"{native}/params: damaged, checksums do not match ({name})"
    with pytest.raises(SystemExit) as caught:
        inspect(native, capsys)
    assert caught.value.code.startswith(f"error: {native}: not a complete checkpoint: {message}")
    assert "│ complete │ no" in " ".join(capsys.readouterr().out.split())
    for read in (lambda: convert(native, tmp_path / "back"), lambda: load_model(native)):
        with pytest.raises(HymbaError, match="damaged") as damaged:
            read()
        assert str(damaged.value).startswith(message)
    assert not (tmp_path / "back").exists()


@pytest.fixture
def run(tmp_path):
    """A run directory with a checkpoint of step 3."""
    model = make_model(TINY)
    params = nnx.to_pure_dict(nnx.state(model))
    (tmp_path / "config.toml").write_text(model_toml(model.config, model.compute))
    moments = [(), {"count": jnp.int32(3), "mu": jax.random.normal(jax.random.key(0), (64, 300))}]
    with Checkpoints(tmp_path, 1) as checkpoints:
        checkpoints.save(TrainState(params, moments), LoopState(3, {}))
    return tmp_path


def flip_a_bit(checkpoint):
    files = [*(checkpoint / "optimizer").rglob("d/*")]
    largest = max(files, key=lambda file: file.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 4
    largest.write_bytes(content)


def change_a_digest(checkpoint):
    file = checkpoint / "loop" / "metadata"
    file.write_text(file.read_text().replace('"digests": {}', '"digests": {"a": "b"}'))


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (flip_a_bit, "/optimizer: "),
        (lambda checkpoint: shutil.rmtree(checkpoint / "optimizer"), "/optimizer: is missing"),
        (lambda checkpoint: (checkpoint / "optimizer" / "_METADATA").unlink(), "/optimizer: "),
        (lambda checkpoint: shutil.rmtree(checkpoint / "loop"), "/loop: is missing"),
        (change_a_digest, "/loop/metadata: damaged, its checksum does not match"),
    ],
)
def test_what_resuming_needs_is_part_of_a_checkpoint(run, damage, problem):
    assert NativeCheckpoint(run).damage() == []
    damage(run / "checkpoints" / "3")
    (found,) = NativeCheckpoint(run).damage()
    assert found.startswith(f"{run}/checkpoints/3{problem}")


def test_a_name_on_hugging_face_is_explained(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        cli.inspect(["nvidia/Hymba-1.5B-Base"], "hymba inspect")
    assert (
        "hf download nvidia/Hymba-1.5B-Base --local-dir Hymba-1.5B-Base, "
        "then convert it with hymba convert Hymba-1.5B-Base TARGET"
    ) in caught.value.code
    with pytest.raises(HymbaError, match=r"no model found, .* hf download nvidia/Hymba"):
        read_model_directory("nvidia/Hymba-1.5B-Base")
    with pytest.raises(HymbaError, match=r"no model found, there is no such directory$"):
        read_model_directory(tmp_path / "gone")
