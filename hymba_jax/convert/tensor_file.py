"""The safetensors format: a length, a JSON header, then the tensors' bytes.

Read and written here, not by its library, to hold no more of a file in memory than one tensor and
to fill tensors in pieces.
"""

import itertools
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes  # noqa: F401 (NumPy then knows bfloat16 by its name)
import numpy as np

from hymba_jax.convert.writing import write_bytes
from hymba_jax.errors import HymbaError

_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
_LENGTH_BYTES = 8


class TensorInfo(NamedTuple):
    """What a header says of a tensor.

    Attributes:
      dtype: its name, such as bfloat16.
      shape: its sizes.
    """

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


class TensorFile:
    """A safetensors file to read from. Only its header is read before a tensor is asked for.

    Attributes:
      tensors: what the file holds, by name.

    Raises:
      HymbaError: the file is truncated, or no such file.
    """

    def __init__(self, path: Path):
        self.path = path
        size = path.stat().st_size
        entries, self._data_start = _read_header(path, size)
        self.tensors: dict[str, TensorInfo] = {}
        self._starts: dict[str, int] = {}
        end = 0
        for name, entry in sorted(entries.items(), key=lambda item: _begin(path, *item)):
            info, start, stop = _parse_entry(path, name, entry)
            if start != end:
                raise HymbaError(f"{path}: broken: {name} does not begin where the last one ends")
            end = stop
            self.tensors[name], self._starts[name] = info, start
        if self._data_start + end != size:
            raise HymbaError(
                f"{path}: {'truncated' if self._data_start + end > size else 'broken'}: it has "
                f"{size:,} bytes, its header speaks of {self._data_start + end:,}: get it again"
            )

    def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        """A part of a tensor, read when it is used and not kept."""
        dtype, shape = self.tensors[name]
        if 0 in shape:
            return np.zeros(shape, dtype)[index]
        start = self._data_start + self._starts[name]
        return np.memmap(self.path, dtype, "r", start, shape)[index]


def _read_header(path: Path, size: int) -> tuple[dict[str, Any], int]:
    """The header's entries, and where the tensors begin."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        if size < _LENGTH_BYTES or length > size - _LENGTH_BYTES:
            raise HymbaError(
                f"{path}: truncated, or no safetensors file: its header should have {length:,} "
                f"bytes, the whole file has {size:,}: get it again"
            )
        text = file.read(length)
    try:
        entries = json.loads(text, object_pairs_hook=_without_repeats)
        entries.pop("__metadata__", None)
        return entries, _LENGTH_BYTES + length
    except (ValueError, AttributeError, TypeError) as error:
        raise HymbaError(f"{path}: broken: its header is no JSON object ({error})") from error


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        raise ValueError("a name stands in it twice")
    return table


def _begin(path: Path, name: str, entry: Any) -> tuple[int, int]:
    """Where a tensor's bytes are, first those without any."""
    try:
        start, stop = entry["data_offsets"]
        return int(start), int(stop)
    except (TypeError, KeyError, ValueError) as error:
        raise HymbaError(f"{path}: broken: its header says nothing of {name}'s place") from error


def _parse_entry(path: Path, name: str, entry: Any) -> tuple[TensorInfo, int, int]:
    start, stop = _begin(path, name, entry)
    dtype, shape = entry.get("dtype"), entry.get("shape")
    if not isinstance(dtype, str) or not _is_shape(shape):
        raise HymbaError(f"{path}: broken: its header gives {name} no dtype or no shape")
    info = TensorInfo(_DTYPES.get(dtype, dtype), tuple(shape))
    if dtype in _DTYPES and info.nbytes != stop - start:
        raise HymbaError(
            f"{path}: broken: {name} of shape {info.shape} in {dtype} has {stop - start:,} bytes, "
            f"not {info.nbytes:,}"
        )
    return info, start, stop


def _is_shape(shape: Any) -> bool:
    return isinstance(shape, list) and all(type(size) is int and size >= 0 for size in shape)


class TensorFileWriter:
    """A new safetensors file to fill in any order; it is on the disk once it is synced.

    Attributes:
      tensors: all that the file will hold, in this order.
    """

    def __init__(self, path: Path, tensors: Mapping[str, TensorInfo]):
        self.path, self.tensors = path, tensors
        header = _make_header(tensors)
        ends = [*itertools.accumulate(info.nbytes for info in tensors.values())]
        starts = (len(header) + start for start in (0, *ends))
        self._starts = dict(zip(tensors, starts, strict=False))
        path.write_bytes(header)
        os.truncate(path, len(header) + ends[-1])

    def write(self, name: str, start: int, rows: np.ndarray) -> None:
        """Writes rows of a tensor, from this one on. `rows` is contiguous and of its dtype."""
        dtype, shape = self.tensors[name]
        assert rows.dtype == dtype
        with self.path.open("r+b", buffering=0) as file:
            file.seek(self._starts[name] + start * math.prod(shape[1:]) * rows.itemsize)
            write_bytes(file, rows)


def _make_header(tensors: Mapping[str, TensorInfo]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # which transformers insists on
    end = 0
    for name, info in tensors.items():
        entries[name] = {
            "dtype": _CODES[info.dtype],
            "shape": info.shape,
            "data_offsets": [end, end := end + info.nbytes],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _LENGTH_BYTES)  # so that tensors are aligned
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text


def split_into_shards(
    tensors: Mapping[str, TensorInfo], max_bytes: int
) -> Iterator[dict[str, TensorInfo]]:
    """The tensors of each file, in order; one that is too large has a file for itself."""
    shard: dict[str, TensorInfo] = {}
    size = 0
    for name, info in tensors.items():
        if shard and size + info.nbytes > max_bytes:
            yield shard
            shard, size = {}, 0
        shard[name] = info
        size += info.nbytes
    yield shard
