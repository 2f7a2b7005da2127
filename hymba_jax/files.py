"""Files and directories that are whole or not there."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def replace_text(path: Path, text: str) -> None:
    """Writes a file so that whoever reads it, even after a crash, finds the old or the new text."""
    beside = path.with_name(f"{path.name}.partial")
    try:
        beside.write_text(text, encoding="utf-8")
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


@contextmanager
def written_beside(directory: Path) -> Iterator[Path]:
    """A new directory to write to, which at the end of the context becomes `directory`.

    An exception leaves nothing of it, and whatever was at `directory` as it was.
    """
    beside = directory.with_name(f"{directory.name}.partial")
    before = directory.with_name(f"{directory.name}.replaced")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    try:
        yield beside
        _sync(beside)
        if directory.exists():
            shutil.rmtree(before, ignore_errors=True)
            directory.rename(before)
        beside.rename(directory)
        shutil.rmtree(before, ignore_errors=True)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _sync(directory: Path) -> None:
    """Waits until a directory is on the disk, so that its new name cannot get there first."""
    for path in (directory, *directory.rglob("*")):
        file = os.open(path, os.O_RDONLY)
        try:
            os.fsync(file)
        finally:
            os.close(file)
