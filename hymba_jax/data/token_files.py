"""Files of tokens that others wrote: which are at a path, and what tells them from others."""

import glob
import hashlib
from collections.abc import Sequence
from pathlib import Path

from hymba_jax.data.listing import is_url
from hymba_jax.data.megatron import megatron_files
from hymba_jax.errors import HymbaError
from hymba_jax.files import resolve_path

_SUFFIXES = (".bin", ".idx", ".npy")
# What is read of a file to tell it from others: so many blocks of so many bytes, evenly spread.
_BLOCKS, _BLOCK = 64, 4096


def find_token_files(path: str) -> list[Path]:
    """The files of tokens at a path, in order; none if there is something else.

    It may be a file `.npy` or `.bin`, `NAME`, `NAME.bin` or `NAME.idx` of Megatron's format, a glob
    of such, or a directory with nothing else.
    """
    if not path or is_url(path):
        return []
    local = resolve_path(path)
    if local.is_dir():
        found = sorted(entry for entry in local.iterdir() if not entry.name.startswith("."))
    elif local.exists():
        found = [local]
    elif local.suffix not in _SUFFIXES and all(file.exists() for file in megatron_files(local)):
        return [local.with_name(f"{local.name}.bin")]
    else:
        found = sorted(map(Path, glob.glob(str(local), recursive=True)))
    if not found or any(file.suffix not in _SUFFIXES for file in found):
        return []
    tokens = [file.with_suffix(".bin") if file.suffix == ".idx" else file for file in found]
    return list(dict.fromkeys(tokens))


def digest_of(files: Sequence[Path]) -> str:
    """A digest of the sizes of files and their indices, and of samples of their content.

    It takes no time in proportion to their size; a change between the samples goes unnoticed.

    Raises:
      HymbaError: a file cannot be read.
    """
    digest = hashlib.blake2b(digest_size=16)
    indices = [megatron_files(file)[1] for file in files if file.suffix == ".bin"]
    for file in (*files, *filter(Path.exists, indices)):
        try:
            size = file.stat().st_size
            digest.update(size.to_bytes(8))
            with file.open("rb") as content:
                for index in range(_BLOCKS):
                    content.seek(max(size - _BLOCK, 0) * index // (_BLOCKS - 1))
                    digest.update(content.read(_BLOCK))
        except OSError as error:
            raise HymbaError(f"{file}: cannot be read ({error.strerror})") from error
    return digest.hexdigest()
