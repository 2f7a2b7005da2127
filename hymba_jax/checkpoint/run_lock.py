"""One run at a time in an output directory: a lock that ends with the process that holds it.

The lock is a POSIX lock (`lockf`) on a file in the directory. Unlike a file that is there or not,
it cannot outlive its owner; unlike `flock`, whose lock lives as long as any forked child has the
file open, it belongs to the process alone, and NFS and Lustre forward it to the other hosts. It has
two traps: a process never conflicts with itself, so what it holds is kept here; and closing
any descriptor of the file releases the lock, so a file that this process holds is never opened.
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

LOCK = "run.lock"  # inside the run directory, while a run writes there

_TAKEN = (errno.EACCES, errno.EAGAIN)
_held: set[tuple[int, int]] = set()  # lock files, by device and inode


@contextmanager
def locked(directory: Path, warn: Callable[[str], None]) -> Iterator[None]:
    """Makes a run directory and holds its lock; what it made and is left empty is removed again.

    Args:
      warn: is told where the file system has no locks; the directory is then used without one.

    Raises:
      HymbaError: another run holds the lock.
      OSError: the directory cannot be written.
    """
    made = [path for path in (directory, *directory.parents) if not path.exists()]
    try:
        directory.mkdir(parents=True, exist_ok=True)
        file = _acquire(directory, warn)
        held = _identity(os.fstat(file))
        _held.add(held)
        try:
            yield
        finally:
            # Removed while it is held: whoever opened it before finds that it is gone.
            (directory / LOCK).unlink(missing_ok=True)
            os.close(file)
            _held.discard(held)
    finally:
        for path in made:
            with suppress(OSError):
                path.rmdir()


def check_unlocked(directory: Path) -> None:
    """Raises HymbaError if a run is writing to the directory."""
    path = directory / LOCK
    if not path.is_file():
        return
    _check_own(path)
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        _lock(file, fcntl.LOCK_SH, path)
    except OSError:  # without locks there is nothing to ask
        pass
    finally:
        os.close(file)


def _acquire(directory: Path, warn: Callable[[str], None]) -> int:
    """A descriptor of the lock file, locked."""
    path = directory / LOCK
    while True:
        _check_own(path)
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            _lock(file, fcntl.LOCK_EX, path)
        except HymbaError:
            os.close(file)
            raise
        except OSError as error:
            warn(
                f"{directory}: its file system has no locks ({error.strerror}): nothing keeps "
                "another run from writing there"
            )
        with suppress(FileNotFoundError):
            if _identity(path.stat()) == _identity(os.fstat(file)):
                break
        os.close(file)  # its owner ended and removed it
    os.ftruncate(file, 0)
    now = time.strftime("%Y-%m-%d %H:%M:%S")
    os.write(file, f"process {os.getpid()} on {socket.gethostname()} since {now}\n".encode())
    return file


def _lock(file: int, kind: int, path: Path) -> None:
    try:
        fcntl.lockf(file, kind | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in _TAKEN:
            raise
        holder = os.pread(file, 200, 0).decode(errors="replace").strip()
        raise _taken(path, holder or "another process") from error


def _check_own(path: Path) -> None:
    with suppress(FileNotFoundError):
        if _identity(path.stat()) in _held:
            raise _taken(path, "this process")


def _taken(path: Path, holder: str) -> HymbaError:
    return HymbaError(
        f"{path.parent}: a run is writing there ({holder}): wait for it, stop it, or choose "
        "another directory"
    )


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino
