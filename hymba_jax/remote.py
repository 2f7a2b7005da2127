"""Files in a bucket, `gs://bucket/...` or `s3://bucket/...`, through fsspec.

A store keeps objects. An object appears whole or not at all, and is replaced whole; it can be
created only if it does not exist; a listing shows every object that was written before. There is no
append, rename, link or lock, and a directory is no more than the beginning of names.
"""

import logging
import posixpath
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

from hymba_jax.errors import HymbaError

# With one slash, too: `file:/a` is a URL, and pathlib makes gs:/a of gs://a.
URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/(/?)")
STORES = ("gs", "s3")
"""Schemes of the stores that hold runs and models."""
_EXTRAS = {"gs": "gcs", "gcs": "gcs", "s3": "s3", "s3a": "s3"}
_WILDCARDS = frozenset("*?[]")


def is_remote_path(path: str) -> bool:
    """Whether a path is the URL of a file or directory in a bucket, rather than a glob."""
    url = URL.match(path)
    return bool(url and url[1] in STORES and not _WILDCARDS & {*path})


class MissingObject(HymbaError):
    """What is to be read does not exist, or the bucket."""


class RemotePath:
    """A file or directory in a bucket, with some of the methods of `pathlib.Path`.

    Nothing is cached, so that what other processes write is seen. Every method raises HymbaError
    for whatever a store refuses; nothing is in a bucket that does not exist.

    Raises:
      HymbaError: the URL is not that of a file or directory in a bucket, or the package that
        reads it is missing.
    """

    def __init__(self, url: str):
        scheme, _, rest = url.partition("://")
        if scheme not in STORES:
            supported = " and ".join(f"{name}://" for name in STORES)
            raise HymbaError(
                f"{url}: {scheme}:// is not supported here, only local paths, {supported} are"
            )
        rest = posixpath.normpath(rest.strip("/"))
        if rest == "." or _WILDCARDS & {*rest}:
            raise HymbaError(f"{url}: name a bucket and a directory in it, without wildcards")
        self._url = f"{scheme}://{rest}"
        self._store, self._key = filesystem(self._url)

    # --- The name ---

    def __fspath__(self) -> str:
        return self._url

    def __str__(self) -> str:
        return self._url

    def __repr__(self) -> str:
        return f"RemotePath({self._url!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RemotePath) and self._url == other._url

    def __hash__(self) -> int:
        return hash(self._url)

    def __truediv__(self, name: str) -> "RemotePath":
        return RemotePath(f"{self._url}/{name}")

    @property
    def name(self) -> str:
        return posixpath.basename(self._key)

    @property
    def stem(self) -> str:
        return posixpath.splitext(self.name)[0]

    @property
    def scheme(self) -> str:
        return self._url.partition(":")[0]

    @property
    def parent(self) -> "RemotePath":
        """The directory above; a bucket's is the bucket."""
        above = posixpath.dirname(self._key) or self._key
        return RemotePath(f"{self.scheme}://{above}")

    @property
    def parents(self) -> list["RemotePath"]:
        """The directories above, innermost first, down to the bucket."""
        parents, path = [], self
        while path.parent != path:
            path = path.parent
            parents.append(path)
        return parents

    def with_name(self, name: str) -> "RemotePath":
        return self.parent / name

    def absolute(self) -> "RemotePath":
        return self

    def resolve(self) -> "RemotePath":
        return self

    # --- What is there ---

    def exists(self) -> bool:
        return self._kind() is not None

    def is_file(self) -> bool:
        return self._kind() == "file"

    def is_dir(self) -> bool:
        return self._kind() == "directory"

    def _kind(self) -> str | None:
        with store_errors(self._url):
            try:
                return str(self._store.info(self._key)["type"])
            except FileNotFoundError:
                return None

    def iterdir(self) -> Iterator["RemotePath"]:
        """What is in the directory, nothing if there is no such directory."""
        with store_errors(self._url):
            try:
                names = self._store.ls(self._key, detail=False)
            except FileNotFoundError:
                names = []
        inside = f"{self._key}/"
        return (
            self / name.removeprefix(inside).rstrip("/")
            for name in names
            if name.startswith(inside) and name != inside
        )

    def glob(self, pattern: str) -> list["RemotePath"]:
        """What matches a pattern of names, such as `*.py` or `folder/*`."""
        first, _, rest = pattern.partition("/")
        found = [path for path in self.iterdir() if fnmatchcase(path.name, first)]
        return [match for path in found for match in path.glob(rest)] if rest else found

    # --- Objects ---

    def read_bytes(self) -> bytes:
        with store_errors(self._url):
            return bytes(self._store.cat_file(self._key))

    def write_bytes(self, content: bytes) -> None:
        """Creates the object, or replaces it: a reader finds the old or the new content."""
        with store_errors(self._url, "write"):
            self._store.pipe_file(self._key, content)

    def create(self, content: bytes) -> bool:
        """Creates the object unless it exists; whether it did. Of several writers one succeeds."""
        with store_errors(self._url, "write"):
            try:
                self._store.pipe_file(self._key, content, mode="create")
            except FileExistsError:
                return False
        return True

    def unlink(self) -> None:
        """Removes the object; nothing if there is none."""
        with store_errors(self._url, "remove"), suppress(FileNotFoundError):
            self._store.rm_file(self._key)

    def mkdir(self, *, parents: bool = False, exist_ok: bool = False) -> None:
        """Nothing: a directory exists once something is in it."""

    # --- Directories ---

    def rmtree(self) -> None:
        """Removes everything in the directory; nothing if there is no such directory."""
        with store_errors(self._url, "remove"):
            if keys := self._store.find(self._key):
                self._store.rm(keys)

    def rename(self, target: "RemotePath") -> None:
        """Copies everything in the directory, then removes it; a kill can leave both."""
        with store_errors(self._url, "write"):
            keys = self._store.find(self._key)
            targets = [target._key + key.removeprefix(self._key) for key in keys]
            self._store.copy(keys, targets)
        self.rmtree()

    def download(self, directory: Path, wanted: Callable[[str], bool] = lambda name: True) -> None:
        """Copies what is in this directory into a local one.

        Args:
          wanted: says of the name of each file below this directory whether it is copied.

        Raises:
          HymbaError: the store refuses it, or there is nothing.
          OSError: the local directory cannot be written.
        """
        with store_errors(self._url):
            below = {key.removeprefix(f"{self._key}/"): key for key in self._store.find(self._key)}
        names = [name for name in below if wanted(name)]
        if not names:
            raise MissingObject(f"{self._url}: no such file or directory: check the path")
        files = [directory / name for name in names]
        for file in files:
            file.parent.mkdir(parents=True, exist_ok=True)
        with store_errors(self._url):
            self._store.get([below[name] for name in names], [str(file) for file in files])

    def upload(self, directory: Path) -> None:
        """Copies everything in a local directory into this one, in no particular order."""
        files = [path for path in directory.rglob("*") if path.is_file()]
        keys = [f"{self._key}/{file.relative_to(directory).as_posix()}" for file in files]
        with store_errors(self._url, "write"):
            self._store.put([str(file) for file in files], keys)


def silence_stores() -> None:
    """Silences the packages' own messages, as errors are raised; for commands, not libraries."""
    for package in ("gcsfs", "google.auth", "s3fs"):
        logging.getLogger(package).setLevel(logging.CRITICAL)


def filesystem(url: str) -> tuple[Any, str]:
    """What reads a URL, without a cache, and the path that it has there.

    Raises:
      HymbaError: nothing reads its scheme.
    """
    import fsspec  # only where a bucket is used: it takes long

    scheme = url.partition(":")[0]
    try:
        fsspec.get_filesystem_class(scheme)
    except ImportError as error:
        extra = _EXTRAS.get(scheme)
        advice = f"pip install 'hymba_jax[{extra}]'" if extra else str(error)
        raise HymbaError(
            f"{url}: the package that reads {scheme}:// is missing: {advice}"
        ) from error
    except ValueError as error:
        raise HymbaError(
            f"{url}: nothing reads {scheme}://: give a local path, gs://, s3:// or another scheme "
            "of fsspec"
        ) from error
    with store_errors(url):
        return fsspec.url_to_fs(url, use_listings_cache=False)


@contextmanager
def store_errors(url: str, verb: Literal["read", "write", "remove"] = "read") -> Iterator[None]:
    """Turns whatever a store's package raises into one line."""
    try:
        yield
    except HymbaError:
        raise
    except FileNotFoundError as error:
        what = "file or directory: check the path" if verb == "read" else "bucket: create it first"
        raise MissingObject(f"{url}: no such {what}") from error
    except Exception as error:  # of the packages' HTTP libraries, which share no base class
        if isinstance(error, PermissionError) or str(error).startswith("Forbidden"):  # gcsfs
            line = f"{url}: no permission to {verb} it: check your credentials"
        else:
            done = {"read": "read", "write": "written", "remove": "removed"}[verb]
            reason = f"{type(error).__name__}: {error}".partition("\n")[0]
            line = f"{url}: cannot be {done} ({reason})"
        raise HymbaError(line) from error
