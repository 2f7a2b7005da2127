"""The checkpoints of a run, found without importing JAX and Orbax."""

import os
import re

from hymba_jax.files import Location, resolve_location
from hymba_jax.remote import RemotePath

FOLDER = "checkpoints"  # inside the run directory
COMMITTED = "commit_success.txt"
"""Written last into a checkpoint in a bucket, by Orbax too; on a disk a rename completes it."""

_STEP = re.compile("0|[1-9][0-9]*")


def checkpoint_steps(run_directory: str | os.PathLike[str]) -> list[int]:
    """Steps with a complete checkpoint, oldest first."""
    directory = resolve_location(run_directory) / FOLDER
    if not directory.is_dir():
        return []
    return sorted(
        int(path.name)
        for path in directory.iterdir()
        if _STEP.fullmatch(path.name) and _is_complete(path)
    )


def uses_orbax(directory: Location) -> bool:
    """Whether Orbax reads and writes arrays there itself: on disks and in gs:// buckets."""
    return not isinstance(directory, RemotePath) or directory.scheme == "gs"


def _is_complete(checkpoint: Location) -> bool:
    if isinstance(checkpoint, RemotePath):
        return (checkpoint / COMMITTED).is_file()
    return checkpoint.is_dir()
