"""The Zarr format in its simplest form: an array is one uncompressed file beside its header.

Orbax restores it like any other. Read and written here, not by TensorStore, to go without its
copies, and to know when writing has ended, also if it failed.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from hymba_jax.convert.writing import write_bytes
from hymba_jax.files import parse_json, read_text

_HEADER = ".zarray"


def map_array(directory: Path, dtype: str, shape: tuple[int, ...]) -> np.ndarray | None:
    """An array, read when it is used and not kept; None if it is not in this form.

    Raises:
      OSError, ValueError: it cannot be read, or is not all there.
    """
    header, file = directory / _HEADER, directory / _file_name(shape)
    if not header.is_file() or parse_json(read_text(header)) != _header(np.dtype(dtype), shape):
        return None
    if not file.is_file():
        raise ValueError(f"{file.name} is missing, or no regular file")
    array = np.memmap(file, dtype, "r", shape=shape)
    if file.stat().st_size != array.nbytes:
        raise ValueError(f"{file.name} is longer than its header says")
    return array


def write_array(directory: Path, array: np.ndarray) -> None:
    """Writes a contiguous array into a new directory. Raises OSError where that is impossible."""
    directory.mkdir()
    (directory / _HEADER).write_text(json.dumps(_header(array.dtype, array.shape)))
    with (directory / _file_name(array.shape)).open("wb", buffering=0) as file:
        write_bytes(file, array)


def _header(dtype: np.dtype, shape: tuple[int, ...]) -> dict[str, Any]:
    return {
        "zarr_format": 2,
        "shape": [*shape],
        "chunks": [*shape],
        "dtype": "bfloat16" if dtype.name == "bfloat16" else dtype.str,
        "order": "C",
        "compressor": None,
        "filters": None,
        "fill_value": None,
        "dimension_separator": ".",
    }


def _file_name(shape: tuple[int, ...]) -> str:
    """Of the only chunk: the first along every axis."""
    return ".".join("0" for _ in shape)
