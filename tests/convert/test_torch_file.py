"""PyTorch's own files: through torch where it is installed, else refused."""

import importlib.util
import json
import pickle
import sys

import pytest
from convert.hf import (
    assert_same_bits,
    convert,
    golden_weights,
    random_bits,
    read_hf,
    write_hf,
)

from hymba_jax.errors import HymbaError

HAS_TORCH = importlib.util.find_spec("torch") is not None
needs_torch = pytest.mark.skipif(not HAS_TORCH, reason="torch is not installed")


@pytest.fixture
def hf(tmp_path):
    directory = write_hf(tmp_path / "hf")
    (directory / "model.safetensors").unlink()
    return directory


def test_without_torch_it_is_refused(hf, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    (hf / "pytorch_model.bin").write_bytes(b"anything")
    with pytest.raises(HymbaError, match="torch is not installed: pip install torch, or get the"):
        convert(hf, tmp_path / "native")
    assert not (tmp_path / "native").exists()


def test_no_other_pickle_is_opened(hf, tmp_path):
    (hf / "model.pkl").write_bytes(pickle.dumps({}))
    (hf / "model.pt").write_bytes(pickle.dumps({}))
    with pytest.raises(HymbaError, match="no weights found"):
        convert(hf, tmp_path / "native")


def save(path, weights):
    import torch

    bits = {2: torch.int16, 4: torch.int32}
    torch.save(
        {
            name: torch.from_numpy(array.view(f"i{array.itemsize}").copy())
            .view(bits[array.itemsize])
            .view(getattr(torch, str(array.dtype)))
            for name, array in weights.items()
        },
        path,
    )


@needs_torch
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_with_torch_every_bit_is_kept(hf, tmp_path, dtype):
    weights = random_bits(golden_weights(), {"": dtype})
    save(hf / "pytorch_model.bin", weights)
    native = convert(hf, tmp_path / "native")
    assert_same_bits(read_hf(convert(native, tmp_path / "back")), weights)


@needs_torch
def test_many_files(hf, tmp_path):
    weights = golden_weights()
    names = sorted(weights)
    places = {}
    for i, part in enumerate((names[:50], names[50:])):
        save(hf / f"pytorch_model-{i}.bin", {name: weights[name] for name in part})
        places |= dict.fromkeys(part, f"pytorch_model-{i}.bin")
    index = json.dumps({"weight_map": places})
    (hf / "pytorch_model.bin.index.json").write_text(index)
    native = convert(hf, tmp_path / "native")
    assert_same_bits(read_hf(convert(native, tmp_path / "back")), weights)


@needs_torch
def test_a_pickle_that_runs_something_is_refused(hf, tmp_path):
    import torch

    class Evil:
        def __reduce__(self):
            return (print, ("evil",))

    torch.save({"a": Evil()}, hf / "pytorch_model.bin")
    with pytest.raises(HymbaError, match="torch cannot read it"):
        convert(hf, tmp_path / "native")
