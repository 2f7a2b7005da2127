"""HF checkpoints, written by the safetensors library, and conversions of them."""

import json
import lzma
import shutil
from pathlib import Path

import ml_dtypes  # noqa: F401 (NumPy then knows bfloat16 by its name)
import numpy as np
import safetensors.numpy
from golden_cases import GOLDEN

from hymba_jax.convert.convert import ConvertConfig, main

CASE = "tiny-shared"
COMPANIONS = {
    "tokenizer.json": b'{ "odd" :\t"spacing"}\n\n',
    "tokenizer.model": bytes(range(256)),
    "tokenizer_config.json": b'{"bos_token": "<s>"}',
    "special_tokens_map.json": b"{}",
    "added_tokens.json": b'{"[PAD]": 32000}\r\n',
    "generation_config.json": b'{"_from_model_config": true}',
    "modeling_hymba.py": b"# the HF implementation\n",
}
# As in the config.json of Hymba-1.5B-Base.
AUTO_MAP = {
    "AutoConfig": "configuration_hymba.HymbaConfig",
    "AutoModelForCausalLM": "modeling_hymba.HymbaForCausalLM",
}


def golden_weights(case: str = CASE) -> dict[str, np.ndarray]:
    packed = GOLDEN / case / "model.safetensors.xz"
    if packed.exists():
        return safetensors.numpy.load(lzma.decompress(packed.read_bytes()))
    return safetensors.numpy.load_file(GOLDEN / case / "model.safetensors")


def golden_config(case: str = CASE) -> dict:
    return json.loads((GOLDEN / case / "config.json").read_text())


def write_hf(
    directory: Path,
    weights: dict[str, np.ndarray] | None = None,
    case: str = CASE,
    **config: object,
) -> Path:
    """An HF checkpoint with a golden case's weights, unless others are given."""
    directory.mkdir()
    weights = golden_weights(case) if weights is None else weights
    safetensors.numpy.save_file(weights, directory / "model.safetensors", {"format": "pt"})
    if config:
        text = json.dumps(golden_config(case) | config, indent=1)
        (directory / "config.json").write_text(text)
    else:
        shutil.copyfile(GOLDEN / case / "config.json", directory / "config.json")
    return directory


def read_hf(directory: Path) -> dict[str, np.ndarray]:
    """All tensors, read by the safetensors library."""
    files = sorted(directory.glob("*.safetensors"))
    return {
        name: array for file in files for name, array in safetensors.numpy.load_file(file).items()
    }


def convert(source: Path, target: Path, **options: object) -> Path:
    main(ConvertConfig(str(source), str(target), **options))
    return target


def assert_same_bits(native: dict[str, np.ndarray], hf: dict[str, np.ndarray]) -> None:
    assert native.keys() == hf.keys()
    for name, expected in hf.items():
        assert native[name].dtype == expected.dtype, name
        assert native[name].shape == expected.shape, name
        assert native[name].tobytes() == expected.tobytes(), name


def random_bits(weights: dict[str, np.ndarray], dtypes: dict[str, str]) -> dict[str, np.ndarray]:
    """Tensors of these names and shapes whose bits are anything: NaN, infinities, -0, denormals.

    Args:
      dtypes: for a part of a name; the last one that a name has decides.
    """
    rng = np.random.default_rng(0)
    result = {}
    for name, array in weights.items():
        dtype = np.dtype([dtype for part, dtype in dtypes.items() if part in name][-1])
        result[name] = np.frombuffer(rng.bytes(array.size * dtype.itemsize), dtype).reshape(
            array.shape
        )
    return result
