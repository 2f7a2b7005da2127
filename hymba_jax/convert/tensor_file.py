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
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes  # noqa: F401 (NumPy then knows bfloat16 by its name)
import numpy as np

from hymba_jax.convert.writing import write_bytes
from hymba_jax.errors import HymbaError
from hymba_jax.files import open_regular

# Bits of an element, of every dtype that the format has.
_WIDTHS = {
    4: ("F4",),
    6: ("F6_E2M3", "F6_E3M2"),
    8: ("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0"),
    16: ("U16", "I16", "F16", "BF16"),
    32: ("U32", "I32", "F32"),
    64: ("U64", "I64", "F64", "C64"),
}
_BITS = {dtype: bits for bits, dtypes in _WIDTHS.items() for dtype in dtypes}
_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
_LENGTH_BYTES = 8
_MAX_HEADER = 100_000_000  # bytes, as in the safetensors library
_MAX_SIZE = 2**63 - 1  # of an axis


class TensorInfo(NamedTuple):
    """What a header says of a tensor.

    Attributes:
      dtype: its name, such as bfloat16; the format's own, such as I64, where no Hymba has it.
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
      HymbaError: it is no regular file, is truncated, or is not as the format requires: a JSON
        object with a known dtype, a shape and a place for each tensor, whose places have neither
        gaps nor overlaps.
    """

    def __init__(self, path: Path):
        self.path = path
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            entries = _read_header(path, file, size)
            self._data_start = file.tell()
        parsed = [(*_parse_entry(path, name, entry), name) for name, entry in entries.items()]
        self.tensors: dict[str, TensorInfo] = {}
        self._starts: dict[str, int] = {}
        end = 0
        for start, stop, info, name in sorted(parsed, key=lambda item: item[:2]):
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


def _read_header(path: Path, file: BinaryIO, size: int) -> dict[str, Any]:
    """The header's entries; the file then stands where the tensors begin."""
    length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
    if size < _LENGTH_BYTES or length > size - _LENGTH_BYTES:
        raise HymbaError(
            f"{path}: truncated, or no safetensors file: its header should have {length:,} "
            f"bytes, the whole file has {size:,}: get it again"
        )
    if length > _MAX_HEADER:
        raise HymbaError(
            f"{path}: broken: its header has {length:,} bytes, and the format allows "
            f"{_MAX_HEADER:,}"
        )
    text = file.read(length)
    try:
        if not text.startswith(b"{"):
            raise ValueError("it does not begin with {")
        entries = json.loads(text, object_pairs_hook=_without_repeats)
    except RecursionError as error:
        raise HymbaError(f"{path}: broken: its header is nested too deeply") from error
    except ValueError as error:
        raise HymbaError(f"{path}: broken: its header is no JSON object ({error})") from error
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise HymbaError(f"{path}: broken: its __metadata__ is not an object of texts")
    return entries


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        raise ValueError("a name stands in it twice")
    return table


def _parse_entry(path: Path, name: str, entry: Any) -> tuple[int, int, TensorInfo]:
    """Where a tensor's bytes begin and end, and what they are."""
    entry = entry if isinstance(entry, dict) else {}
    place, dtype, shape = entry.get("data_offsets"), entry.get("dtype"), entry.get("shape")
    if not _are_sizes(place) or len(place) != 2:
        raise HymbaError(f"{path}: broken: its header says nothing of {name}'s place")
    if not isinstance(dtype, str) or not _are_sizes(shape):
        raise HymbaError(f"{path}: broken: its header gives {name} no dtype or no shape")
    if dtype not in _BITS:
        raise HymbaError(
            f"{path}: broken: {name} has dtype {dtype!r}, which the format does not have"
        )
    start, stop = place
    bits = math.prod(shape) * _BITS[dtype]
    if bits != 8 * (stop - start):
        raise HymbaError(
            f"{path}: broken: {name} of shape {(*shape,)} in {dtype} has {stop - start:,} bytes, "
            f"not {bits / 8 if bits % 8 else bits // 8:,}"
        )
    return start, stop, TensorInfo(_DTYPES.get(dtype, dtype), tuple(shape))


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(
        type(value) is int and 0 <= value <= _MAX_SIZE for value in values
    )


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
