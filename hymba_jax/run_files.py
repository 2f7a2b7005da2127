"""The checkpoints of a run, found without importing JAX and Orbax."""

import os
import re

from hymba_jax.files import resolve_path

FOLDER = "checkpoints"  # inside the run directory

_STEP = re.compile("0|[1-9][0-9]*")


def checkpoint_steps(run_directory: str | os.PathLike[str]) -> list[int]:
    """Steps with a complete checkpoint, oldest first."""
    directory = resolve_path(run_directory) / FOLDER
    if not directory.is_dir():
        return []
    return sorted(
        int(path.name)
        for path in directory.iterdir()
        if _STEP.fullmatch(path.name) and path.is_dir()
    )
