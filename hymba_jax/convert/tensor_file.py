"""safetensors files: read by their library, written a part of a tensor at a time."""

import json
import math
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes  # noqa: F401 (NumPy then knows bfloat16 by its name)
import numpy as np
from safetensors import SafetensorError, safe_open

from hymba_jax.errors import HymbaError
from hymba_jax.files import open_regular

_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
_ALIGNMENT = 8  # bytes
# Bytes after which a file is reopened: the library maps the file, and read pages stay resident.
# Opening takes a millisecond.
_MAX_MAPPED = 64 * 10**6


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
      metadata: strings by name.

    Raises:
      HymbaError: it is not a regular file, or not a complete safetensors file.
    """

    def __init__(self, path: Path):
        self.path = path
        with open_regular(path):  # the library would wait for a FIFO's writer
            pass
        self._file, self._mapped, self._lock = self._open(), 0, threading.Lock()
        self.metadata: dict[str, str] = self._file.metadata() or {}
        slices = {name: self._file.get_slice(name) for name in self._file.offset_keys()}
        self.tensors = {
            name: TensorInfo(
                _DTYPES.get(part.get_dtype(), part.get_dtype()), tuple(part.get_shape())
            )
            for name, part in slices.items()
        }

    def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        """A part of a tensor."""
        part: np.ndarray = self._file.get_slice(name)[index]
        with self._lock:
            self._mapped += part.nbytes
            if self._mapped > _MAX_MAPPED:
                self._file, self._mapped = self._open(), 0
        return part

    def _open(self) -> Any:
        try:
            return safe_open(self.path, framework="np")
        except SafetensorError as error:
            raise HymbaError(
                f"{self.path}: truncated, damaged or not a safetensors file ({error}): get it again"
            ) from error


class TensorFileWriter:
    """A new safetensors file to fill in any order.

    The library writes a file at once, of tensors that are all in memory.

    Attributes:
      tensors: all that the file will hold, in this order.
    """

    def __init__(self, path: Path, tensors: Mapping[str, TensorInfo]):
        self.path, self.tensors = path, tensors
        entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # as transformers requires
        self._offsets: dict[str, int] = {}
        end = 0
        for name, info in tensors.items():
            self._offsets[name], end = end, end + info.nbytes
            entries[name] = {
                "dtype": _CODES[info.dtype],
                "shape": info.shape,
                "data_offsets": [self._offsets[name], end],
            }
        header = json.dumps(entries, separators=(",", ":")).encode()
        header += b" " * (-len(header) % _ALIGNMENT)
        path.write_bytes(len(header).to_bytes(8, "little") + header)
        self._data_start = path.stat().st_size
        os.truncate(path, self._data_start + end)

    def write(self, name: str, start: int, rows: np.ndarray) -> None:
        """Writes rows of a tensor, from this one on, and waits until the disk has them.

        Args:
          rows: contiguous, and of the tensor's dtype.
        """
        dtype, shape = self.tensors[name]
        assert rows.dtype == dtype
        assert rows.flags.c_contiguous
        offset = self._data_start + self._offsets[name]
        offset += start * math.prod(shape[1:]) * rows.itemsize
        with self.path.open("r+b") as file:
            file.seek(offset)
            file.write(rows.reshape(-1).view(np.uint8))
            file.flush()
            os.fsync(file.fileno())
        drop_cached(self.path, offset, rows.nbytes)


def drop_cached(path: Path, start: int = 0, size: int = 0) -> None:
    """Drops the page cache of a file, or of `size` bytes of it.

    Several GB of it would fill the memory, which on virtual machines is slower than the disk.
    """
    if hasattr(os, "posix_fadvise"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), start, size, os.POSIX_FADV_DONTNEED)
