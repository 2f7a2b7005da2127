"""One run at a time in an output directory."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

from hymba_jax import file_lock, remote_lock
from hymba_jax.files import Location
from hymba_jax.remote import RemotePath

LOCK = "run.lock"  # inside the run directory, while a run writes there


def locked(directory: Location, warn: Callable[[str], None]) -> AbstractContextManager[None]:
    """Makes a run directory and holds its lock; empty directories that it made are removed again.

    Args:
      warn: is told where the file system has no locks (the directory is then used without one), and
        that the lock in a bucket is watched.

    Raises:
      HymbaError: another run holds the lock.
      OSError: the directory cannot be written.
    """
    if isinstance(directory, RemotePath):
        return remote_lock.locked(directory / LOCK, "run", warn)
    return file_lock.locked(directory / LOCK, "run", warn)


def check_unlocked(directory: Path) -> None:
    """Raises HymbaError if a run is writing to the directory."""
    file_lock.check_unlocked(directory / LOCK, "run")
