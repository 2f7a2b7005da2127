"""One writer at a time in a directory: a lock file in it, whose lock ends with its holder.

The lock is a POSIX lock (`lockf`). Unlike a file that is there or not, it cannot outlive its owner;
unlike `flock`, whose lock lives as long as any forked child has the file open, it belongs to the
process alone, and NFS and Lustre forward it to the other hosts. It has two traps: a process never
conflicts with itself, so what it holds is kept here; and closing any descriptor of the file
releases the lock, so a file that this process holds is never opened.
"""

import errno
import fcntl
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from hymba_jax.errors import HymbaError

_TAKEN = (errno.EACCES, errno.EAGAIN)
_held: set[tuple[int, int]] = set()  # lock files, by device and inode


@contextmanager
def locked(path: Path, writer: str, warn: Callable[[str], None]) -> Iterator[None]:
    """Makes a lock file and its directory, and holds the lock; at the end the file is removed.

    Of the directories that it made those that are left empty are removed again.

    Args:
      writer: what writes to the directory, such as "run".
      warn: is told where the file system has no locks; the directory is then used without one.

    Raises:
      HymbaError: another holds the lock.
      OSError: the directory cannot be written.
    """
    made = [directory for directory in path.parents if not directory.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = _acquire(path, writer, warn)
        held = _identity(os.fstat(file))
        _held.add(held)
        try:
            yield
        finally:
            # Removed while it is held: whoever opened it before finds that it is gone.
            path.unlink(missing_ok=True)
            os.close(file)
            _held.discard(held)
    finally:
        for directory in made:
            with suppress(OSError):
                directory.rmdir()


@contextmanager
def waited_for(path: Path) -> Iterator[None]:
    """Makes a lock file and holds the lock, for which other processes wait; the file stays.

    Raises:
      OSError: the file cannot be written, or its file system has no locks.
    """
    with path.open("a") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        yield


def check_unlocked(path: Path, writer: str) -> None:
    """Raises HymbaError, the same as `locked`, if anybody holds the lock."""
    if not path.is_file():
        return
    _check_own(path, writer)
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        _lock(file, fcntl.LOCK_SH, path, writer)
    except OSError:  # without locks there is nothing to ask
        pass
    finally:
        os.close(file)


def _acquire(path: Path, writer: str, warn: Callable[[str], None]) -> int:
    """A descriptor of the lock file, locked."""
    while True:
        _check_own(path, writer)
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            _lock(file, fcntl.LOCK_EX, path, writer)
        except HymbaError:
            os.close(file)
            raise
        except OSError as error:
            warn(
                f"{path.parent}: its file system has no locks ({error.strerror}): nothing keeps "
                f"another {writer} from writing there"
            )
        with suppress(FileNotFoundError):
            if _identity(path.stat()) == _identity(os.fstat(file)):
                break
        os.close(file)  # its owner ended and removed it
    os.ftruncate(file, 0)
    now = time.strftime("%Y-%m-%d %H:%M:%S")
    os.write(file, f"process {os.getpid()} on {socket.gethostname()} since {now}\n".encode())
    return file


def _lock(file: int, kind: int, path: Path, writer: str) -> None:
    try:
        fcntl.lockf(file, kind | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in _TAKEN:
            raise
        holder = os.pread(file, 200, 0).decode(errors="replace").strip()
        raise _taken(path, writer, holder or "another process") from error


def _check_own(path: Path, writer: str) -> None:
    with suppress(FileNotFoundError):
        if _identity(path.stat()) in _held:
            raise _taken(path, writer, "this process")


def _taken(path: Path, writer: str, holder: str) -> HymbaError:
    return HymbaError(
        f"{path.parent}: a {writer} is writing there ({holder}): wait for it, stop it, or choose "
        "another output"
    )


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino
