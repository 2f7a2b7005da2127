"""Checkpoints in a bucket that Orbax does not write to: written on the disk, then uploaded.

Orbax 0.12 takes an s3:// URL for a relative path, though TensorStore has a driver for it. So it
writes each checkpoint into a temporary directory; its thread then uploads that, and at last the
object that commits it, as Orbax does in gs:// buckets. The disk holds two checkpoints.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

from orbax.checkpoint.checkpoint_managers import LatestN

from hymba_jax.checkpoint.checkpoints import Checkpoints, LoopState, always, read_checkpoint
from hymba_jax.checkpoint.preservation import Preservation
from hymba_jax.checkpoint.train_state import TrainState
from hymba_jax.files import on_disk, resolve_location
from hymba_jax.remote import RemotePath
from hymba_jax.run_files import COMMITTED, FOLDER, checkpoint_steps, uses_orbax


def open_checkpoints(
    run_directory: str,
    keep: int,
    keep_steps: Sequence[int] = (),
    *,
    keep_best: bool = False,
    is_scheduled: Callable[[int], bool] = always,
) -> Checkpoints:
    """The checkpoints of a run, on a disk or in a bucket, as of `Checkpoints`."""
    directory = resolve_location(run_directory)
    if isinstance(directory, RemotePath) and not uses_orbax(directory):
        return UploadedCheckpoints(
            directory, keep, keep_steps, keep_best=keep_best, is_scheduled=is_scheduled
        )
    return Checkpoints(directory, keep, keep_steps, keep_best=keep_best, is_scheduled=is_scheduled)


class UploadedCheckpoints(Checkpoints):
    """The checkpoints of a run in a bucket, of a single process.

    Args:
      run_directory: holds them in its folder `checkpoints`.
      keep, keep_steps, keep_best, is_scheduled: as of `Checkpoints`.

    Raises:
      HymbaError: the store refuses it.
      OSError: there is no space on the disk; its directory is TMPDIR.
    """

    def __init__(
        self,
        run_directory: RemotePath,
        keep: int,
        keep_steps: Sequence[int] = (),
        *,
        keep_best: bool = False,
        is_scheduled: Callable[[int], bool] = always,
    ):
        self.directory = self._bucket = run_directory / FOLDER
        self._keep_best = keep_best
        self._preservation = Preservation(keep, is_scheduled, keep_steps)
        self._remove_partial()
        with ExitStack() as opened:
            self._local = Path(opened.enter_context(TemporaryDirectory(prefix="hymba-")))
            self._open(self._local, LatestN(1), self._upload)
            self._opened = opened.pop_all()

    def _read(self, step: int, abstract: TrainState) -> tuple[TrainState, LoopState]:
        with on_disk(self._bucket / str(step)) as copy:
            return read_checkpoint(copy, step, abstract)

    def close(self) -> None:
        try:
            super().close()
        finally:
            self._opened.close()

    def _upload(self) -> None:
        """Uploads the checkpoint that Orbax has written, and removes those that are not kept."""
        (written,) = (path for path in self._local.iterdir() if not path.name.isdecimal())
        target = self._bucket / written.name.partition(".")[0]
        target.upload(written)
        (target / COMMITTED).write_bytes(b"")
        steps = checkpoint_steps(self._bucket.parent)
        for step in {*steps} - self._preservation.preserved(steps):
            old = self._bucket / str(step)
            (old / COMMITTED).unlink()  # first: what is left after a kill is no checkpoint
            old.rmtree()

    def _remove_partial(self) -> None:
        """Removes what a run that was killed had uploaded of a checkpoint."""
        for checkpoint in self._bucket.iterdir():
            if not (checkpoint / COMMITTED).is_file():
                checkpoint.rmtree()
