"""Files: expanding user paths, reading untrusted files, atomic writes."""

import json
import os
import re
import secrets
import shutil
import stat
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from hymba_jax.errors import HymbaError

type PathLike = str | os.PathLike[str]

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/")


def resolve_path(path: PathLike) -> Path:
    """The path with `~` and `~user` expanded, otherwise unchanged.

    Every command resolves its paths here, and before any work.

    Raises:
      HymbaError: it is a URL, has no such home directory, or cannot be a path.
    """
    text = os.fspath(path)
    if url := _URL.match(text):
        raise HymbaError(
            f"{text}: {url[1]}:// is not supported, only local paths are: mount or copy it"
        )
    if "\0" in text:
        raise HymbaError(f"{text!r}: a path cannot contain a null character")
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise HymbaError(f"{text}: {error}") from error


def read_text(path: PathLike) -> str:
    """The text of a regular file in UTF-8, without a byte order mark.

    Raises:
      HymbaError: it is not a regular file, or not UTF-8.
      OSError: it cannot be read.
    """
    with open_regular(path) as file:
        content = file.read()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise HymbaError(f"{path}: not UTF-8 text (byte {error.start})") from error


def open_regular(path: PathLike) -> Any:
    """A file opened for reading bytes; devices and FIFOs, which may never end, are refused.

    Raises:
      HymbaError: it is not a regular file.
      OSError: it cannot be opened.
    """
    # Opening a FIFO would wait for its writer.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    kind = file_kind(os.fstat(descriptor).st_mode)
    if kind != "regular file":
        os.close(descriptor)
        raise HymbaError(f"{path}: is a {kind}, not a regular file")
    return open(descriptor, "rb")


def file_kind(mode: int) -> str:
    """What `os.stat` says a file is, in words."""
    kinds: dict[str, Callable[[int], bool]] = {
        "regular file": stat.S_ISREG,
        "directory": stat.S_ISDIR,
        "FIFO": stat.S_ISFIFO,
        "socket": stat.S_ISSOCK,
    }
    return next((name for name, is_kind in kinds.items() if is_kind(mode)), "device")


def read_json(path: PathLike) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
      HymbaError: it does not exist, is not JSON, or is another JSON value.
      OSError: it cannot be read.
    """
    try:
        value = parse_json(read_text(path))
    except FileNotFoundError as error:
        raise HymbaError(f"{path}: no such file") from error
    except ValueError as error:
        raise HymbaError(f"{path}: broken JSON ({error})") from error
    if not isinstance(value, dict):
        raise HymbaError(f"{path}: not a JSON object")
    return value


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text. Raises ValueError if it is invalid or nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def read_toml(path: PathLike) -> dict[str, Any]:
    """The table in a TOML file.

    Raises:
      HymbaError: it does not exist, or is not TOML.
      OSError: it cannot be read.
    """
    try:
        return tomllib.loads(read_text(path))
    except FileNotFoundError as error:
        raise HymbaError(f"{path}: no such file") from error
    except RecursionError as error:
        raise HymbaError(f"{path}: not a TOML file (nested too deeply)") from error
    except ValueError as error:
        raise HymbaError(f"{path}: not a TOML file ({error})") from error


def replace_text(path: Path, text: str) -> None:
    """Writes a file atomically: a reader, even after a crash, finds the old or the new text.

    Permissions are kept, and a symbolic link is followed. Devices and FIFOs are written to
    directly.
    """
    mode = path.stat().st_mode if path.exists() else None
    if mode is not None and not stat.S_ISREG(mode):
        path.write_text(text, encoding="utf-8")
        return
    path = path.resolve()  # only now: /dev/stdout may resolve to a pipe, which has no name
    beside = _beside(path)
    try:
        with beside.open("x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        if mode is not None:
            beside.chmod(stat.S_IMODE(mode))
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


@contextmanager
def written_beside(directory: Path) -> Iterator[Path]:
    """A new directory, which replaces `directory` when the context ends.

    On an exception it is removed, with the parents that were created for it, and an existing
    `directory` is unchanged. A symbolic link is followed.
    """
    directory = directory.resolve()
    beside, before = _beside(directory), _beside(directory)
    above = [path for path in directory.parents if not path.exists()]
    beside.mkdir(parents=True)
    try:
        yield beside
        _sync(beside)
        if directory.exists():
            beside.chmod(stat.S_IMODE(directory.stat().st_mode))
            directory.rename(before)
        try:
            beside.rename(directory)
        except BaseException:  # an interrupt, too
            if before.exists():
                before.rename(directory)
            raise
        shutil.rmtree(before, ignore_errors=True)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
        for path in above:
            if not directory.exists():
                with suppress(OSError):  # not empty: another process wrote there
                    path.rmdir()


def _beside(path: Path) -> Path:
    """An unused name in the same directory."""
    return path.with_name(f"{path.name[:200]}.{secrets.token_hex(4)}.partial")


def _sync(directory: Path) -> None:
    """Flushes a directory tree to the disk, before it is renamed."""
    for path in (directory, *directory.rglob("*")):
        file = os.open(path, os.O_RDONLY)
        try:
            os.fsync(file)
        finally:
            os.close(file)
