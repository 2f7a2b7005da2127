"""Where a run writes its metrics: in its directory, and for one in a bucket, to which nothing can
be appended, on the disk, to be uploaded whole.

They are uploaded before each checkpoint, so that a run that is killed loses no line that its
checkpoints cover, and once a minute for whoever watches the run.
"""

import time
from contextlib import ExitStack, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from hymba_jax.closing import Closing
from hymba_jax.errors import HymbaError
from hymba_jax.files import Location, about
from hymba_jax.remote import RemotePath
from hymba_jax.training.metrics import JSON_LINES, REMOVED
from hymba_jax.training.run_start import STARTS

_PERIOD = 60  # seconds


class Records(Closing):
    """The local directory that a run's metrics are written to, as a context.

    Attributes:
      directory: the run directory; None in a process that writes nothing.
    """

    def __init__(self, directory: Path | None):
        self.directory = directory

    def flush(self) -> None:
        """Lets what is written outlive the process; on a disk it does as soon as it is written."""

    def flush_if_due(self) -> None:
        """The same from time to time, if the store lets it."""

    def close(self) -> None:
        """What is written is there already."""


class UploadedRecords(Records):
    """A temporary directory, and what of it is in the run directory in a bucket.

    Args:
      run_directory: where.

    Raises:
      HymbaError: a file cannot be read or written, on the disk or by the store; `flush` and the end
        of the context do, too.
    """

    def __init__(self, run_directory: RemotePath):
        self._run = run_directory
        self._flushed = time.monotonic()
        with ExitStack() as opened:
            local = Path(opened.enter_context(TemporaryDirectory(prefix="hymba-")))
            with about(run_directory, str(local)):
                for name in (JSON_LINES, REMOVED, STARTS):
                    if (run_directory / name).is_file():
                        (local / name).write_bytes((run_directory / name).read_bytes())
            super().__init__(local)
            self._local = local
            self._opened = opened.pop_all()

    def flush(self) -> None:
        self._flushed = time.monotonic()
        removed = self._local / REMOVED
        if removed.exists():  # before the file without these lines
            (self._run / REMOVED).write_bytes(removed.read_bytes())
        self._run.upload(self._local)

    def flush_if_due(self) -> None:
        if time.monotonic() > self._flushed + _PERIOD:
            with suppress(HymbaError):  # the next flush is of everything
                self.flush()

    def close(self) -> None:
        with self._opened:
            self.flush()


def open_records(run_directory: Location | None) -> Records:
    """The records of a run; of one that writes nothing if there is no directory."""
    if isinstance(run_directory, RemotePath):
        return UploadedRecords(run_directory)
    return Records(run_directory)
