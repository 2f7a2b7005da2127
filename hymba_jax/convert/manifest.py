"""Which files a conversion wrote, so that a later one replaces nothing else."""

import json
from pathlib import Path

from hymba_jax.errors import HymbaError
from hymba_jax.files import read_json

_MANIFEST = ".hymba_convert.json"


def write_manifest(directory: Path) -> None:
    """Names in a new directory all files that it holds."""
    text = json.dumps({"files": _files(directory)}, indent=1) + "\n"
    (directory / _MANIFEST).write_text(text, encoding="utf-8")


def not_written(directory: Path) -> list[str]:
    """The files in a directory that no conversion wrote.

    Raises:
      HymbaError: what it wrote cannot be read.
    """
    manifest = directory / _MANIFEST
    written = read_json(manifest).get("files") if manifest.exists() else []
    if not isinstance(written, list):
        raise HymbaError(f"{manifest}: broken, it has no list of files")
    return [name for name in _files(directory) if name not in {_MANIFEST, *written}]


def _files(directory: Path) -> list[str]:
    """All that is no directory, by its path from here."""
    return sorted(
        str(path.relative_to(directory))
        for path in directory.rglob("*")
        if path.is_symlink() or not path.is_dir()
    )
