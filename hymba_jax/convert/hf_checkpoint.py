"""An HF checkpoint, to read from: config.json, and tensors in one file or many."""

from collections import Counter
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Protocol, runtime_checkable

import jax
import numpy as np

from hymba_jax.config import ComputeConfig, HymbaConfig
from hymba_jax.convert.arrays import bits
from hymba_jax.convert.hf_config import read_architecture
from hymba_jax.convert.mapping import (
    EMBEDDING,
    HEAD,
    ConversionError,
    HFSlice,
    hf_shapes,
    hf_slices,
    mismatches,
)
from hymba_jax.convert.tensor_file import TensorFile, TensorInfo
from hymba_jax.convert.torch_file import TorchFile
from hymba_jax.errors import HymbaError
from hymba_jax.files import read_json
from hymba_jax.hf_files import HF_CONFIG
from hymba_jax.model.abstract import ParamPath, abstract_params

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
TORCH_WEIGHTS, TORCH_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"


@runtime_checkable
class Weights(Protocol):
    """A file of tensors."""

    tensors: dict[str, TensorInfo]

    def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray: ...


class HFCheckpoint:
    """An HF checkpoint to read from. No tensor is read before it is asked for.

    Attributes:
      directory: where it is.
      settings: its config.json.
      config: the architecture that this describes.
      tensors: dtype and shape of every tensor, by name.

    Raises:
      HymbaError: a file is missing, broken or truncated, or describes another architecture; all
        such files are named.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        self.settings = read_json(directory / HF_CONFIG)
        self.config: HymbaConfig = read_architecture(directory, self.settings)
        self._files = _open_all(directory)

    @cached_property
    def tensors(self) -> dict[str, TensorInfo]:
        return {name: file.tensors[key] for name, (file, key) in self._places.items()}

    @cached_property
    def _places(self) -> dict[str, tuple[Weights, str]]:
        """The file that holds each tensor, and its name there."""
        places = {name: (file, name) for file in self._files for name in file.tensors}
        if self.config.tie_embeddings and EMBEDDING not in places and HEAD in places:
            places[EMBEDDING] = places.pop(HEAD)
        return places

    @property
    def has_tied_copy(self) -> bool:
        """Whether it holds the output projection beside the embedding, which is the same."""
        return self.config.tie_embeddings and HEAD in self.tensors

    @property
    def has_only_head(self) -> bool:
        """Whether it holds the embedding under the name of the output projection alone."""
        return self._places.get(EMBEDDING, (None, EMBEDDING))[1] == HEAD

    @cached_property
    def bfloat16_params(self) -> dict[ParamPath, jax.ShapeDtypeStruct]:
        """Native parameters as a model in bfloat16 has them, some of which stay float32."""
        compute = ComputeConfig(param_dtype="bfloat16", scan_layers=False)
        return abstract_params(self.config, compute)

    @cached_property
    def hf_slices(self) -> list[HFSlice]:
        """Of the native parameters, with one array for each layer (layers are not scanned)."""
        shapes = {path: like.shape for path, like in self.bfloat16_params.items()}
        return hf_slices(shapes, self.config, scan_layers=False)

    def problems(self) -> list[str]:
        """Every tensor that does not fit the architecture, in words, from the headers alone."""
        if wrapped := _wrapper_problem(self.tensors):
            return [wrapped]
        shapes = hf_shapes(self.hf_slices)
        if self.has_tied_copy:
            shapes[HEAD] = shapes[EMBEDDING]
        return mismatches(self.tensors, shapes)

    def check(self) -> None:
        """Raises ConversionError naming every tensor that does not fit the architecture."""
        if problems := self.problems():
            raise ConversionError(
                f"{self.directory}: weights and {HF_CONFIG} do not fit: " + "; ".join(problems)
            )

    def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        """A part of a tensor.

        Raises:
          ConversionError: the embedding differs from the output projection, though config.json ties
            them.
        """
        part = self._read(name, index)
        if name == EMBEDDING and self.has_tied_copy:
            copy = self._read(HEAD, index)
            if part.dtype != copy.dtype or not np.array_equal(bits(part), bits(copy)):
                raise ConversionError(
                    f"{self.directory}: {HEAD} differs from {EMBEDDING}, though {HF_CONFIG} "
                    "ties them: set tie_word_embeddings to false there to "
                    f"keep both, or remove {HEAD} from the weights"
                )
        return part

    def _read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        file, key = self._places[name]
        return file.read(key, index)


# What PyTorch's wrappers put into the names of tensors.
_WRAPPERS = {"module": "DataParallel or DistributedDataParallel", "_orig_mod": "torch.compile"}


def _wrapper_problem(names: Iterable[str]) -> str:
    """Which wrapper a model was saved in, in words; nothing if it was not."""
    for wrapper, cause in _WRAPPERS.items():
        for name in names:
            if wrapper in name.split("."):
                return (
                    f"{name} and others have the prefix {wrapper!r} of {cause} in their "
                    "names: save the unwrapped model, or remove the prefix from the names"
                )
    return ""


def _open_all(directory: Path) -> list[Weights]:
    """The files that hold the weights, in transformers' order of preference."""
    if (directory / WEIGHTS).exists():
        return [TensorFile(directory / WEIGHTS)]
    if (directory / INDEX).exists():
        return _open_shards(directory / INDEX, TensorFile)
    if (directory / TORCH_WEIGHTS).exists():
        return [TorchFile(directory / TORCH_WEIGHTS)]
    if (directory / TORCH_INDEX).exists():
        return _open_shards(directory / TORCH_INDEX, TorchFile)
    raise HymbaError(
        f"{directory}: no weights found: there is no {WEIGHTS}, {INDEX}, {TORCH_WEIGHTS} or "
        f"{TORCH_INDEX}"
    )


def _open_shards(index: Path, kind: type[TensorFile] | type[TorchFile]) -> list[Weights]:
    """The files of an index, which holds the tensors that it says, each in one file."""
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(file, str) for file in places.values()):
        raise HymbaError(f"{index}: has no weight_map from tensors to files")
    files: dict[str, Weights] = {}
    problems = []
    for name in sorted(set(places.values())):
        if Path(name).name != name:
            problems.append(f"{name!r} is not a file in this directory")
        elif not (index.parent / name).exists():
            problems.append(f"{name} is missing")
        else:
            try:
                files[name] = kind(index.parent / name)
            except HymbaError as error:
                problems.append(str(error).removeprefix(f"{index.parent}/"))
    if not problems:
        problems = _index_problems(places, files)
    if problems:
        raise HymbaError(f"{index}: " + "; ".join(problems))
    return [*files.values()]


def _index_problems(places: dict[str, str], files: dict[str, Weights]) -> list[str]:
    held = Counter(name for file in files.values() for name in file.tensors)
    problems = [f"{name} is in {count} files" for name, count in held.items() if count > 1]
    problems += [
        f"{name} is not in {file}"
        for name, file in places.items()
        if name not in files[file].tensors
    ]
    problems += [f"{name} is missing from the index" for name in held if name not in places]
    return problems
