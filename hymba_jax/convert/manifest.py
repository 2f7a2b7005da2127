"""Which files a conversion wrote, so that a later one replaces nothing else."""

import json
from pathlib import Path
from typing import Any

from hymba_jax.errors import HymbaError
from hymba_jax.files import read_json

_MANIFEST = ".hymba_convert.json"


def write_manifest(directory: Path) -> None:
    """Lists in a new directory all its files, with size and mtime."""
    text = json.dumps({"files": _files(directory)}, indent=1) + "\n"
    (directory / _MANIFEST).write_text(text, encoding="utf-8")


def not_written(directory: Path) -> list[str]:
    """The files in a directory that were not written by a conversion, or were modified since.

    Raises:
      HymbaError: the manifest cannot be read.
    """
    manifest = directory / _MANIFEST
    written = read_json(manifest).get("files") if manifest.exists() else {}
    if not isinstance(written, dict):
        raise HymbaError(f"{manifest}: broken, it has no list of files")
    files = _files(directory).items()
    return [name for name, state in files if name != _MANIFEST and written.get(name) != state]


def _files(directory: Path) -> dict[str, list[Any]]:
    """Size and mtime (ns) of all files, by relative path."""
    files = {}
    for path in sorted(directory.rglob("*")):
        if path.is_symlink() or not path.is_dir():
            status = path.lstat()
            files[str(path.relative_to(directory))] = [status.st_size, status.st_mtime_ns]
    return files
