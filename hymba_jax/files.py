"""Files: the paths that users write, reading untrusted files, atomic writes."""

import json
import os
import secrets
import shutil
import stat
import tomllib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from hymba_jax.errors import HymbaError
from hymba_jax.remote import STORES, URL, RemotePath

type PathLike = str | os.PathLike[str]
type Location = Path | RemotePath
"""Where a run, a model or one of its files is: on a disk, or in a bucket."""


def resolve_location(path: PathLike) -> Location:
    """The path with `~` and `~user` expanded, or what a URL of a bucket names.

    Every command resolves its paths here, and before any work.

    Raises:
      HymbaError: it is another URL, has no such home directory, or cannot be a path; or the package
        that reads the bucket is missing.
    """
    text = os.fspath(path)
    if url := URL.match(text):
        return RemotePath(f"{url[1]}://{text[url.end() :]}")
    if "\0" in text:
        raise HymbaError(f"{text!r}: a path cannot contain a null character")
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise HymbaError(f"{text}: {error}") from error


def resolve_path(path: PathLike) -> Path:
    """The same for what has to be on a disk.

    Raises:
      HymbaError: as for `resolve_location`, or it is in a bucket.
    """
    url = URL.match(os.fspath(path))
    if url and url[1] in STORES:
        raise HymbaError(f"{path}: has to be local: mount the bucket, or copy from or to it")
    location = resolve_location(path)
    assert isinstance(location, Path)
    return location


def cache_directory() -> Path:
    """Where this package keeps what it can make again, for all runs of a user on this host."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "hymba_jax"


def matches(directory: Location, pattern: str) -> list[Location]:
    """What matches a pattern of names below a directory, in order."""
    found: list[Location] = [*directory.glob(pattern)]
    return sorted(found, key=str)


def read_text(path: PathLike) -> str:
    """The text of a regular file, or of an object, in UTF-8, without a byte order mark.

    Raises:
      HymbaError: it is not a regular file, or not UTF-8, or a store refuses it.
      OSError: it cannot be read.
    """
    content = read_bytes(path)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise HymbaError(f"{path}: not UTF-8 text (byte {error.start})") from error


def read_bytes(path: PathLike) -> bytes:
    """The content of a regular file, or of an object.

    Raises:
      HymbaError: it is not a regular file, or a store refuses it.
      OSError: it cannot be read.
    """
    if isinstance(path, RemotePath):
        return path.read_bytes()
    with open_regular(path) as file:
        return bytes(file.read())


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


def parse_json(text: str | bytes, *, strict: bool = False) -> Any:
    """The value of a JSON text. Raises ValueError if it is invalid or nested too deeply.

    Args:
      strict: NaN and infinities, which Python's parser takes, are invalid, as JSON has none.
    """
    try:
        return json.loads(text, parse_constant=_refuse_constant if strict else None)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def parse_json_object(text: str) -> dict[str, Any]:
    """The object of a JSON text. Raises ValueError as `parse_json`, or if it is another value."""
    value = parse_json(text)
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    return value


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON number")


def json_text(value: Any) -> str:
    """JSON as UTF-8 can hold it: half of a UTF-16 pair, which comes as an escape, stays one."""
    text = json.dumps(value, ensure_ascii=False)
    return text.encode("utf-8", "backslashreplace").decode()


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


def check_output_file(path: Path, inputs: Sequence[Path] = ()) -> None:
    """Raises HymbaError if no file can be there, before any work is done for it.

    Args:
      inputs: files that it must not replace.
    """
    if any(path.resolve() == file.resolve() for file in inputs):
        raise HymbaError(f"{path}: is the input, name another file")
    if path.is_dir():
        raise HymbaError(f"{path}: is a directory, name a file")
    directory = path.resolve().parent  # that of what a symbolic link points to
    if path.exists() and not path.is_file():
        if not os.access(path, os.W_OK):
            raise HymbaError(f"{path}: cannot be written")
    elif not directory.is_dir():
        raise HymbaError(f"{path}: there is no directory {directory}")
    elif not os.access(directory, os.W_OK):
        raise HymbaError(f"{path}: no file can be written in {directory}")


def replace_text(path: Location, text: str) -> None:
    """`replace_bytes` of text in UTF-8."""
    replace_bytes(path, text.encode())


def replace_bytes(path: Location, content: bytes) -> None:
    """Writes a file atomically: a reader, even after a crash, finds the old or the new content.

    In a bucket that is one PUT. On a disk permissions are kept, and a symbolic link is followed;
    devices and FIFOs are written to directly.
    """
    if isinstance(path, RemotePath):
        path.write_bytes(content)
        return
    mode = path.stat().st_mode if path.exists() else None
    if mode is not None and not stat.S_ISREG(mode):
        path.write_bytes(content)
        return
    path = path.resolve()  # only now: /dev/stdout may resolve to a pipe, which has no name
    beside = _beside(path)
    try:
        with beside.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if mode is not None:
            beside.chmod(stat.S_IMODE(mode))
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def rename(directory: Location, name: str) -> None:
    """Gives a directory another name; in a bucket that copies what is in it."""
    if isinstance(directory, RemotePath):
        directory.rename(directory.with_name(name))
    else:
        directory.rename(directory.with_name(name))


def remove_tree(directory: Location) -> None:
    """Removes a directory as far as it can, if there is one."""
    if isinstance(directory, RemotePath):
        directory.rmtree()
    else:
        shutil.rmtree(directory, ignore_errors=True)


@contextmanager
def on_disk(
    directory: Location, wanted: Callable[[str], bool] = lambda name: True
) -> Iterator[Path]:
    """A local directory itself, or a copy of one in a bucket, which is removed at the end.

    A HymbaError about the copy names the bucket.

    Args:
      wanted: says of the name of each file below a directory in a bucket whether it is copied.

    Raises:
      HymbaError: the store refuses it, or there is nothing.
      OSError: there is no space for the copy.
    """
    if isinstance(directory, Path):
        yield directory
        return
    with TemporaryDirectory(prefix="hymba-") as copy, about(directory, copy):
        directory.download(Path(copy), wanted)
        yield Path(copy)


@contextmanager
def about(directory: Location, copy: str) -> Iterator[None]:
    """Lets a HymbaError about a copy of a directory name the directory."""
    try:
        yield
    except HymbaError as error:
        raise type(error)(str(error).replace(copy, str(directory))) from error


@contextmanager
def written_into(directory: Location) -> Iterator[Path]:
    """A local directory itself; for one in a bucket a local one that is uploaded at the end.

    On an exception it is not.
    """
    if isinstance(directory, Path):
        yield directory
        return
    with TemporaryDirectory(prefix="hymba-") as local:
        yield Path(local)
        directory.upload(Path(local))


@contextmanager
def written_beside(directory: Location) -> Iterator[Path]:
    """A new local directory, which replaces `directory` when the context ends.

    On an exception it is removed, with the parents that were created for it, and an existing
    `directory` is unchanged. A symbolic link is followed. In a bucket its files are added or
    replaced one by one.
    """
    if isinstance(directory, RemotePath):
        with written_into(directory) as local:
            yield local
        return
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
