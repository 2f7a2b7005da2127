"""The files of a corpus: local or in a bucket, one file, a directory or a glob, in a fixed order.

Local files are walked here, so that devices and FIFOs are never opened and links that lead back
are noticed; everything behind a URL is listed and read by fsspec.
"""

import errno
import io
import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any, get_args

from fsspec.utils import glob_translate

from hymba_jax.config.data import RecallName
from hymba_jax.errors import HymbaError
from hymba_jax.files import PathLike, file_kind, open_regular, resolve_path
from hymba_jax.remote import URL, filesystem, store_errors

_WILDCARD = re.compile(r"[*?[]")
# What may be meant to name a generated task.
_LIKE_TASK = re.compile(r"\w+(:\d+){2,3}")
# What makes a directory that of a run, here or in another place.
_RUN_FILES = ("config.toml", "tokenizer.json", "checkpoints")
# What stores call it that tells contents of an object apart.
_VERSIONS = ("etag", "ETag", "LastModified", "last_modified", "mtime")
# Bytes that are asked of a server at once, at least.
_REMOTE_BLOCK = 1 << 20


def is_url(path: str) -> bool:
    """Whether a path is a URL of any scheme, not a local path."""
    return bool(URL.match(path))


@dataclass(frozen=True)
class File:
    """A file that a corpus may be read from.

    Attributes:
      name: its path below the corpus with `/` between its parts, or a lone file's own name.
      path: a local path or a URL.
      size: bytes; None where a server does not say.
      version: time of modification, or what a server has to tell contents apart; empty if unknown.
    """

    name: str
    path: str
    size: int | None
    version: str = ""

    def open(self) -> io.BufferedReader:
        """The file, opened for reading bytes.

        Raises:
          HymbaError: it is no regular file, or a server refuses it (then or while it is read).
          OSError: it is local and cannot be opened.
        """
        if not URL.match(self.path):
            return open_regular(self.path)
        store, path = filesystem(self.path)
        with store_errors(self.path):
            remote = store.open(path, "rb")
        return io.BufferedReader(_RemoteFile(remote, self.path), _REMOTE_BLOCK)


@dataclass(frozen=True)
class Listing:
    """The files of a corpus, sorted by name, at least one.

    Attributes:
      skipped: what was met and is not read, and how often, such as `hidden entries: 2`.
    """

    files: tuple[File, ...]
    skipped: Counter[str] = field(default_factory=Counter)


def list_files(path: str, *, skip: Collection[PathLike] = ()) -> Listing:
    """The files at a path: itself, those below a directory, or those that match a glob.

    A glob has `*`, `?` and `[...]`, which match within one name, or `**`, which matches any number
    of directories; it names files, not directories. What exists under that very name is no glob.
    Links to files and directories are followed. Left out are hidden files and directories, run
    directories, empty files, links to nothing or back to a directory above, and whatever is no
    regular file.

    Args:
      path: a local path, as a person writes it, or a URL whose scheme fsspec knows.
      skip: run directories that are left out, whether they look like one yet or not.

    Raises:
      HymbaError: the path cannot be read, is to be skipped itself, or has no files.
    """
    skipped: Counter[str] = Counter()
    url = URL.match(path)
    if url is None:
        found = _local(resolve_path(path), skip, skipped)
    elif url[1] in ("file", "local"):
        rest = path[url.end() :]
        found = _local(resolve_path(rest if url[2] else f"/{rest}"), skip, skipped)
    else:
        found = _remote(f"{url[1]}://{path[url.end() :]}", skip, skipped)
    files = []
    for file in sorted(found, key=lambda file: file.name):
        if file.size == 0:
            skipped["empty files"] += 1
        else:
            files.append(file)
    if not files:
        raise HymbaError(_nothing_to_read(path, skipped))
    return Listing(tuple(files), skipped)


def _nothing_to_read(path: str, skipped: Counter[str]) -> str:
    counts = ", ".join(f"{what}: {count}" for what, count in sorted(skipped.items()))
    left_out = f" (left out: {counts})" if counts else ""
    return f"{path}: no files to read{left_out}: give a file, a directory with files, or a glob"


def _same_as_output(path: object) -> HymbaError:
    return HymbaError(
        f"{path}: is data.path and output, too: choose an output of its own, which may be a "
        "directory in it"
    )


def _split_glob(path: str, exists: Callable[[str], bool]) -> tuple[str, str]:
    """The directory that a glob begins at and its pattern below that; no pattern if it is none."""
    parts = path.split("/")
    for index, part in enumerate(parts):
        if _WILDCARD.search(part) and not exists("/".join(parts[: index + 1])):
            return "/".join([*parts[:index], ""]), "/".join(parts[index:])
    return path, ""


def _matcher(pattern: str, path: object) -> tuple[Callable[[str], Any], int | None]:
    """Tells whether a name matches a pattern, and how many directories deep matches can be."""
    pattern = pattern or "**"
    try:
        matches = re.compile(glob_translate(pattern)).match
    except (ValueError, re.error) as error:
        raise HymbaError(f"{path}: not a glob ({error})") from error
    parts = pattern.split("/")
    return matches, None if "**" in parts else len(parts)


# --- Local files ---


def _local(path: Path, skip: Collection[PathLike], skipped: Counter[str]) -> list[File]:
    start, pattern = _split_glob(str(path), os.path.lexists)
    root = Path(start)
    matches, depth = _matcher(pattern, path)
    # A URL in `skip` is the output of a run elsewhere.
    outputs = {os.path.realpath(resolve_path(o)) for o in skip if not URL.match(str(o))}
    try:
        status = root.stat()
        kind = file_kind(status.st_mode)
        if kind == "regular file" and not pattern:
            return [File(root.name, str(root), status.st_size, str(status.st_mtime_ns))]
        if kind != "directory":
            raise HymbaError(f"{root}: is a {kind}: give a file, a directory or a glob")
        if os.path.realpath(root) in outputs:
            raise _same_as_output(path)
        return [file for file in _walk(root, depth, outputs, skipped) if matches(file.name)]
    except (FileNotFoundError, NotADirectoryError) as error:
        where = error.filename or root
        advice = "check the data path"
        if _LIKE_TASK.fullmatch(str(where)):
            advice += f"; a generated task is {', '.join(get_args(RecallName))}"
        raise HymbaError(f"{where}: no such file or directory: {advice}") from error
    except OSError as error:
        where = error.filename or root
        raise HymbaError(f"{where}: cannot be read ({error.strerror})") from error


def _walk(
    root: Path, depth: int | None, outputs: set[str], skipped: Counter[str]
) -> Iterator[File]:
    """The regular files at most `depth` levels below a directory, in no particular order."""
    # Each directory with the real paths of those above it and its own, to notice loops.
    above: tuple[str, ...] = (os.path.realpath(root),)
    pending = [(str(root), "", above)]
    while pending:
        directory, prefix, above = pending.pop()
        with os.scandir(directory) as entries:
            for entry in entries:
                name = prefix + entry.name
                kind = _entry_kind(entry)
                if kind == "directory":
                    real = _real_path(entry, above[-1])
                    if real in above:
                        skipped["link loops"] += 1
                    elif real in outputs:
                        skipped["the output"] += 1
                    elif _is_run(entry.path):
                        skipped["run directories"] += 1
                    elif depth is None or name.count("/") + 1 < depth:
                        pending.append((entry.path, f"{name}/", (*above, real)))
                elif kind == "regular file":
                    status = entry.stat()
                    yield File(name, entry.path, status.st_size, str(status.st_mtime_ns))
                else:
                    skipped[kind] += 1


def _entry_kind(entry: os.DirEntry[str]) -> str:
    """`directory`, `regular file`, or what is skipped, in the plural."""
    if entry.name.startswith("."):
        return "hidden entries"
    try:
        kind = file_kind(entry.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return "dangling links"
    except OSError as error:
        if error.errno == errno.ELOOP:
            return "link loops"
        raise
    return kind if kind in ("directory", "regular file") else f"{kind}s"


def _real_path(entry: os.DirEntry[str], real_parent: str) -> str:
    if entry.is_symlink():
        return os.path.realpath(entry.path)
    return os.path.join(real_parent, entry.name)


def _is_run(directory: str) -> bool:
    return all(os.path.exists(os.path.join(directory, name)) for name in _RUN_FILES)


# --- Files behind URLs ---


def _remote(url: str, skip: Collection[PathLike], skipped: Counter[str]) -> list[File]:
    store, _ = filesystem(url)
    outputs = {filesystem(str(o))[1] for o in skip if URL.match(str(o))}
    with store_errors(url):
        root, pattern = _split_glob(url, store.exists)
        path = filesystem(root)[1].rstrip("/")
        matches, depth = _matcher(pattern, url)
        info = store.info(path)
        if info["type"] != "directory" and not pattern:
            return [File(path.rpartition("/")[2], url, info["size"], _version(info))]
        if path in outputs:
            raise _same_as_output(url)
        entries = store.find(path, maxdepth=depth, withdirs=True, detail=True)
    # Objects that stand for directories end in a slash, or are the directory itself.
    below = {
        name.removeprefix(f"{path}/"): entry
        for name, entry in entries.items()
        if name != path and not name.endswith("/")
    }
    kinds = dict.fromkeys(_runs(below), "run directories")
    kinds |= {output.removeprefix(f"{path}/"): "the output" for output in outputs}
    return [
        File(name, f"{root.rstrip('/')}/{name}", below[name]["size"], _version(below[name]))
        for name in _outside(below, kinds, skipped)
        if below[name]["type"] != "directory" and matches(name)
    ]


def _version(info: Mapping[str, Any]) -> str:
    """What a server says that another content of the same file would not have."""
    return next((str(info[key]) for key in _VERSIONS if info.get(key)), "")


def _above(name: str) -> Iterator[str]:
    """The directories that a name is in, outermost first, and itself."""
    return accumulate(name.split("/"), "{}/{}".format)


def _runs(names: Collection[str]) -> set[str]:
    """The run directories among the names below a directory."""
    config, *others = _RUN_FILES
    paths = {above for name in names for above in _above(name)}
    directories = {path.removesuffix(f"/{config}") for path in paths if path.endswith(f"/{config}")}
    return {d for d in directories if all(f"{d}/{other}" in paths for other in others)}


def _outside(
    names: Collection[str], kinds: Mapping[str, str], skipped: Counter[str]
) -> Iterator[str]:
    """The names that are neither hidden nor in a directory of `kinds`, which has what it is counted
    as; what keeps others is counted."""
    met = set()
    for name in names:
        for above in _above(name):
            if above in kinds or above.rpartition("/")[2].startswith("."):
                met.add(above)
                break
        else:
            yield name
    skipped.update(kinds.get(above, "hidden entries") for above in met)


class _RemoteFile(io.RawIOBase):
    """A file of fsspec that raises nothing but HymbaError."""

    def __init__(self, file: Any, url: str) -> None:
        self._file, self._url = file, url

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return bool(self._file.seekable())

    def readinto(self, buffer: Any) -> int:
        with store_errors(self._url):
            content = self._file.read(len(buffer))
        buffer[: len(content)] = content
        return len(content)

    def seek(self, offset: int, whence: int = 0) -> int:
        with store_errors(self._url):
            return int(self._file.seek(offset, whence))

    def tell(self) -> int:
        return int(self._file.tell())

    def close(self) -> None:
        self._file.close()
        super().close()
