"""One run at a time in an output directory."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

from hymba_jax import file_lock

LOCK = "run.lock"  # inside the run directory, while a run writes there


def locked(directory: Path, warn: Callable[[str], None]) -> AbstractContextManager[None]:
    """Makes a run directory and holds its lock; empty directories that it made are removed again.

    Args:
      warn: is told where the file system has no locks; the directory is then used without one.

    Raises:
      HymbaError: another run holds the lock.
      OSError: the directory cannot be written.
    """
    return file_lock.locked(directory / LOCK, "run", warn)


def check_unlocked(directory: Path) -> None:
    """Raises HymbaError if a run is writing to the directory."""
    file_lock.check_unlocked(directory / LOCK, "run")
