"""What `hymba inspect` says of checkpoints of either kind."""

import json

import pytest
import safetensors.numpy
from convert.released import convert, golden_weights, write_released
from golden_cases import GOLDEN

from hymba_jax import cli
from hymba_jax.config import PRESETS
from hymba_jax.convert.inspect import count_by_part
from hymba_jax.errors import HymbaError
from hymba_jax.inference.loading import load_model


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    return write_released(tmp_path_factory.mktemp("inspected") / "released")


def inspect(path, capsys):
    cli.inspect([str(path)], "hymba inspect")
    return " ".join(capsys.readouterr().out.split())


def test_both_kinds_hold_the_same(released, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    ours = convert(released, tmp_path / "ours")
    capsys.readouterr()
    theirs, mine = inspect(released, capsys), inspect(ours, capsys)
    for text in (theirs, mine):
        assert "10: G 2*Ww G Www G" in text
        assert "│ parameters │ 310,574" in text
        assert "1.2 MB" in text
        assert "│ complete │ yes" in text
    assert f"float32 │ {len(golden_weights())} tensors" in theirs
    assert "│ form │ released" in theirs
    assert "│ form │ hymba_jax" in mine


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
    released = write_released(tmp_path / "released", weights)
    with pytest.raises(SystemExit) as caught:
        inspect(released, capsys)
    assert "not a whole checkpoint: model.layers.3.mamba.D.0 is missing" in caught.value.code
    assert "complete" in capsys.readouterr().out


def test_another_dtype_is_said(tmp_path, capsys):
    weights = golden_weights()
    weights["model.layers.3.mamba.D.0"] = weights["model.layers.3.mamba.D.0"].astype("float64")
    safetensors.numpy.save_file(weights, write_released(tmp_path / "r") / "model.safetensors")
    with pytest.raises(SystemExit) as caught:
        inspect(tmp_path / "r", capsys)
    assert "has dtype F64" in caught.value.code


def test_a_directory_without_checkpoint(tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        inspect(tmp_path, capsys)
    assert "no checkpoint is here" in caught.value.code


def test_a_flipped_bit_is_found_wherever_arrays_are_read(released, tmp_path, capsys):
    ours = convert(released, tmp_path / "ours")
    name = "segments.1.blocks.0.mixer.ssm.D"
    (file,) = (path for path in (ours / "params").glob("*.ssm.D/0*") if path.parent.name == name)
    content = bytearray(file.read_bytes())
    content[8] ^= 1  # the lowest bit of the third number
    file.write_bytes(content)
    capsys.readouterr()
    message = f"{ours}/params: damaged, other values were written (checksums of {name})"
    with pytest.raises(SystemExit) as caught:
        inspect(ours, capsys)
    assert caught.value.code.startswith(f"error: {ours}: not a whole checkpoint: {message}")
    assert "│ complete │ no" in " ".join(capsys.readouterr().out.split())
    for read in (lambda: convert(ours, tmp_path / "back"), lambda: load_model(ours)):
        with pytest.raises(HymbaError, match="damaged") as damaged:
            read()
        assert str(damaged.value).startswith(message)
    assert not (tmp_path / "back").exists()
