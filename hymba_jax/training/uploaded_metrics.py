"""Metrics files of a run in a bucket: written on the disk, then uploaded whole, as nothing can be
appended there.

They are uploaded before each checkpoint, so that a run that is killed loses no line that its
checkpoints cover, and once a minute for whoever watches the run.
"""

import time
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from hymba_jax.errors import HymbaError
from hymba_jax.files import Location, about
from hymba_jax.remote import RemotePath
from hymba_jax.training.metrics import JSON_LINES, REMOVED, MetricsWriter

_PERIOD = 60  # seconds


def open_metrics(run_directory: Location | None, step: int) -> MetricsWriter:
    """The writer of a run's metrics, see `MetricsWriter`."""
    if isinstance(run_directory, RemotePath):
        return UploadedMetrics(run_directory, step)
    return MetricsWriter(run_directory, step)


class UploadedMetrics(MetricsWriter):
    """Appends to the metrics files of a run directory in a bucket, as a context.

    Args:
      run_directory: where.
      step: updates done so far.

    Raises:
      HymbaError: a file cannot be read or written, on the disk or by the store; `flush` and the end
        of the context do, too.
    """

    def __init__(self, run_directory: RemotePath, step: int):
        self._run = run_directory
        with ExitStack() as opened:
            self._staging = Path(opened.enter_context(TemporaryDirectory(prefix="hymba-")))
            for name in (JSON_LINES, REMOVED):
                if (run_directory / name).is_file():
                    (self._staging / name).write_bytes((run_directory / name).read_bytes())
            with about(run_directory, str(self._staging)):
                super().__init__(self._staging, step)
            opened.callback(super().close)
            if self.removed:
                self.removed = self.removed.replace(str(self._staging), str(run_directory))
                # Before the file without these lines.
                (run_directory / REMOVED).write_bytes((self._staging / REMOVED).read_bytes())
            self.flush()
            self._opened = opened.pop_all()

    def write(self, step: int, values: Mapping[str, int | float | str]) -> None:
        super().write(step, values)
        if time.monotonic() > self._flushed + _PERIOD:
            with suppress(HymbaError):  # the next flush is of everything
                self.flush()

    def flush(self) -> None:
        self._flushed = time.monotonic()
        self._run.upload(self._staging)

    def close(self) -> None:
        with self._opened:
            self.flush()
