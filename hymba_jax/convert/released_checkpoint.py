"""A checkpoint in released form, as a directory: config, tensors in one file or many, the rest."""

from collections import Counter
from functools import cached_property
from pathlib import Path
from typing import Protocol, runtime_checkable

import jax
import numpy as np

from hymba_jax.config import ComputeConfig, HymbaConfig
from hymba_jax.convert.arrays import bits
from hymba_jax.convert.mapping import (
    EMBEDDING,
    HEAD,
    ConversionError,
    Piece,
    abstract_params,
    misfits,
    pieces,
    released_shapes,
)
from hymba_jax.convert.mapping import Path as ParamPath
from hymba_jax.convert.released_config import config_from_released
from hymba_jax.convert.tensor_file import TensorFile, TensorInfo
from hymba_jax.convert.torch_file import TorchFile
from hymba_jax.errors import HymbaError
from hymba_jax.files import read_json

RELEASED_CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
TORCH_WEIGHTS, TORCH_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
# What a released directory has besides config and weights, and what has to come back as it was.
COMPANIONS = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
    "*.py",  # the released code itself, which config.json names
)


@runtime_checkable
class Weights(Protocol):
    """A file of tensors."""

    tensors: dict[str, TensorInfo]

    def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray: ...


class ReleasedCheckpoint:
    """A checkpoint in released form to read from. No tensor is read before it is asked for.

    Attributes:
      directory: where it is.
      settings: its config.json.
      config: the architecture that this describes.
      tensors: dtype and shape of every tensor, by name.

    Raises:
      HymbaError: a file is missing, broken or truncated, or describes another architecture; all
        files that are so are named.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        self.settings = read_json(directory / RELEASED_CONFIG)
        try:
            self.config: HymbaConfig = config_from_released(self.settings)
        except HymbaError as error:
            raise HymbaError(f"{directory / RELEASED_CONFIG}: {error}") from error
        self._files = _open_all(directory)

    @cached_property
    def tensors(self) -> dict[str, TensorInfo]:
        return {name: info for file in self._files for name, info in file.tensors.items()}

    @cached_property
    def _file_of(self) -> dict[str, Weights]:
        return {name: file for file in self._files for name in file.tensors}

    @property
    def has_tied_copy(self) -> bool:
        """Whether it holds the output projection beside the embedding, which is the same."""
        return self.config.tie_embeddings and HEAD in self.tensors

    @cached_property
    def bfloat16_params(self) -> dict[ParamPath, jax.ShapeDtypeStruct]:
        """Our parameters as a model in bfloat16 has them, some of which stay float32."""
        compute = ComputeConfig(param_dtype="bfloat16", scan_layers=False)
        return abstract_params(self.config, compute)

    @cached_property
    def pieces(self) -> list[Piece]:
        """Of our parameters, each layer's in arrays of their own, as a cache needs them."""
        shapes = {path: like.shape for path, like in self.bfloat16_params.items()}
        return pieces(shapes, self.config, scan_layers=False)

    def problems(self) -> list[str]:
        """Every tensor that does not fit the architecture, in words, from the headers alone."""
        shapes = released_shapes(self.pieces)
        if self.has_tied_copy:
            shapes[HEAD] = shapes[EMBEDDING]
        return misfits(self.tensors, shapes)

    def check(self) -> None:
        """Raises ConversionError naming every tensor that does not fit the architecture."""
        if problems := self.problems():
            raise ConversionError(
                f"{self.directory}: weights and {RELEASED_CONFIG} do not fit: "
                + "; ".join(problems)
            )

    def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        """A part of a tensor.

        Raises:
          ConversionError: it is of an embedding that is not equal to the output projection,
            though config.json says so.
        """
        part = self._file_of[name].read(name, index)
        if name == EMBEDDING and self.has_tied_copy:
            copy = self._file_of[HEAD].read(HEAD, index)
            if part.dtype != copy.dtype or not np.array_equal(bits(part), bits(copy)):
                raise ConversionError(
                    f"{self.directory}: {HEAD} differs from {EMBEDDING}, which "
                    f"{RELEASED_CONFIG} says it is: set tie_word_embeddings to false there to "
                    f"keep both, or remove {HEAD} from the weights"
                )
        return part


def companion_files(directory: Path) -> list[Path]:
    """The files that a conversion copies, byte for byte."""
    return [path for name in COMPANIONS for path in sorted(directory.glob(name)) if path.is_file()]


def _open_all(directory: Path) -> list[Weights]:
    """The files that hold the weights, in transformers' order of preference."""
    if (directory / WEIGHTS).is_file():
        return [TensorFile(directory / WEIGHTS)]
    if (directory / INDEX).is_file():
        return _open_shards(directory / INDEX, TensorFile)
    if (directory / TORCH_WEIGHTS).is_file():
        return [TorchFile(directory / TORCH_WEIGHTS)]
    if (directory / TORCH_INDEX).is_file():
        return _open_shards(directory / TORCH_INDEX, TorchFile)
    raise HymbaError(
        f"{directory}: no weights are here: there is no {WEIGHTS}, {INDEX}, {TORCH_WEIGHTS} or "
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
            problems.append(f"{name!r} is no file of this directory")
        elif not (index.parent / name).is_file():
            problems.append(f"{name} is missing")
        else:
            try:
                files[name] = kind(index.parent / name)
            except HymbaError as error:
                problems.append(str(error))
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
    problems += [f"{name} is in no place of the index" for name in held if name not in places]
    return problems
