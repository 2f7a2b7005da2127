"""A model directory on the disk, for what reads its files without Orbax."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hymba_jax.checkpoint.checkpoints import params_path
from hymba_jax.files import Location, on_disk
from hymba_jax.run_files import FOLDER, checkpoint_steps


@contextmanager
def local_copy(directory: Location, step: int | None, part: str = "") -> Iterator[Path]:
    """A local directory itself, or a copy of one in a bucket, which is removed at the end.

    Of checkpoints it has one, or a part of one.

    Args:
      step: which checkpoint of a run is copied; the newest if absent.
      part: of that checkpoint, such as its parameters; all of it if empty.

    Raises:
      HymbaError: the store refuses it, or there is no such directory or checkpoint.
    """
    steps = [] if isinstance(directory, Path) else checkpoint_steps(directory)
    if steps:
        step = int(params_path(directory, steps[-1] if step is None else step).parent.name)

    below = f"{FOLDER}/{step}/{part}/" if part else f"{FOLDER}/{step}/"

    def wanted(name: str) -> bool:
        return not name.startswith(f"{FOLDER}/") or name.startswith(below)

    with on_disk(directory, wanted) as copy:
        yield copy
