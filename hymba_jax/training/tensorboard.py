"""Event files for TensorBoard."""

import json
import math
import secrets
import socket
import time
from collections.abc import Mapping
from contextlib import ExitStack

from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.record_writer import RecordWriter
from tensorboardX.summary import scalar, text

from hymba_jax.training.run_start import RunStart

FOLDER = "tensorboard"  # inside the run directory


class TensorBoard:
    """A new file of events, without the thread of TensorBoard's usual writers.

    That thread dies on a full disk and leaves the program waiting for it.
    """

    def start(self, run: RunStart) -> None:
        folder = run.directory / FOLDER
        folder.mkdir(exist_ok=True)
        name = f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}"
        with ExitStack() as opened:
            self._records = RecordWriter(str(folder / f"{name}.{secrets.token_hex(4)}"))
            opened.callback(self._records.close)
            self._write(
                Event(wall_time=time.time(), file_version="brain.Event:2"),
                # Hides events of earlier files from this step on.
                Event(step=run.step + 1, session_log=SessionLog(status=SessionLog.START)),
                *(
                    Event(wall_time=time.time(), step=run.step, summary=text(name, _as_code(value)))
                    for name, value in (("config", run.config), ("git", run.git))
                ),
            )
            opened.pop_all()

    def write(self, step: int, metrics: Mapping[str, int | float | str]) -> None:
        now = time.time()
        summaries = (
            scalar(name, value)
            for name, value in metrics.items()
            if not isinstance(value, str) and math.isfinite(value)
        )
        self._write(*(Event(wall_time=now, step=step, summary=summary) for summary in summaries))

    def _write(self, *events: Event) -> None:
        for event in events:
            self._records.write(event.SerializeToString())
        self._records.flush()

    def close(self) -> None:
        self._records.close()


def _as_code(value: object) -> str:
    """A JSON value as Markdown, which TensorBoard shows texts as."""
    return f"```\n{json.dumps(value, indent=2)}\n```"
