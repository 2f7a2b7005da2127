"""Metrics files: one JSON line per logged step, and the same to TensorBoard."""

import json
import os
import secrets
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.record_writer import RecordWriter
from tensorboardX.summary import scalar

from hymba_jax.closing import Closing
from hymba_jax.errors import HymbaError
from hymba_jax.files import open_regular, parse_json, replace_text

JSON_LINES = "metrics.jsonl"
REMOVED = "metrics.removed.jsonl"
TENSORBOARD = "tensorboard"


class MetricsWriter(Closing):
    """Appends to `metrics.jsonl` and `tensorboard/` of a run directory, as a context.

    Lines after `step`, left by a run that stopped, and damaged lines are moved to
    `metrics.removed.jsonl`, so that the lines of a resumed run read as if it had never stopped.

    Args:
      run_directory: where; nothing is written if absent.
      step: updates done so far.

    Attributes:
      removed: what was moved, in words; empty if nothing was.

    Raises:
      HymbaError: a file cannot be read or written; `write` and the end of the context do, too.
    """

    def __init__(self, run_directory: Path | None, step: int):
        self.removed = ""
        self._files = ExitStack()
        self._writes = run_directory is not None
        if run_directory is None:
            return
        lines = run_directory / JSON_LINES
        with _named(lines):
            self.removed = _keep_until(lines, run_directory / REMOVED, step)
        with ExitStack() as opened:
            self._lines = opened.enter_context(_Lines(lines))
            self._board = opened.enter_context(_TensorBoard(run_directory / TENSORBOARD, step))
            self._files = opened.pop_all()

    def write(self, step: int, values: Mapping[str, int | float | str]) -> None:
        """Records these values of a step; a float reads back from the JSON as the same float.

        TensorBoard gets the numbers.
        """
        if self._writes:
            self._lines.write((json.dumps({"step": step, **values}) + "\n").encode())
            self._board.write(step, values)

    def flush(self) -> None:
        """Lets what is written outlive the process; on a disk it does as soon as it is written."""

    def close(self) -> None:
        self._files.close()


class _TensorBoard(Closing):
    """A new file of events, without the thread of TensorBoard's usual writers.

    That thread dies on a full disk and leaves the program waiting for it.
    """

    def __init__(self, directory: Path, step: int):
        name = f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}"
        self._path = directory / f"{name}.{secrets.token_hex(4)}"
        with _named(self._path):
            directory.mkdir(exist_ok=True)
            self._records = RecordWriter(str(self._path))
        with ExitStack() as opened:
            opened.push(self)
            self._write(
                Event(wall_time=time.time(), file_version="brain.Event:2"),
                # Hides events of earlier files from this step on.
                Event(step=step + 1, session_log=SessionLog(status=SessionLog.START)),
            )
            opened.pop_all()

    def write(self, step: int, values: Mapping[str, int | float | str]) -> None:
        now = time.time()
        summaries = (
            scalar(name, value) for name, value in values.items() if not isinstance(value, str)
        )
        self._write(*(Event(wall_time=now, step=step, summary=summary) for summary in summaries))

    def _write(self, *events: Event) -> None:
        with _named(self._path):
            for event in events:
                self._records.write(event.SerializeToString())
            self._records.flush()

    def close(self) -> None:
        with _named(self._path):
            self._records.close()


class _Lines(Closing):
    """A file with unbuffered appends."""

    def __init__(self, path: Path):
        self._path = path
        with _named(path):
            self._file = path.open("ab", buffering=0)

    def write(self, content: bytes) -> None:
        with _named(self._path):
            while content:
                content = content[self._file.write(content) :]

    def close(self) -> None:
        self._file.close()


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Turns an error of the operating system into one line about `path`."""
    try:
        yield
    except OSError as error:
        raise HymbaError(
            f"{path}: cannot be written ({error.strerror}): check that the disk is "
            "writable and not full, then run the same command again"
        ) from error


def _keep_until(path: Path, removed: Path, step: int) -> str:
    """Moves damaged lines, and those after `step`, to another file; says in words what it moved.

    They are appended there, byte for byte, before this file is replaced.
    """
    try:
        with open_regular(path) as file:
            content: bytes = file.read()
    except FileNotFoundError:
        return ""
    kept: list[bytes] = []
    moved: list[bytes] = []
    damaged = 0
    for line in filter(bytes.strip, content.split(b"\n")):
        at = _step_of(line)
        damaged += at is None
        (moved if at is None or at > step else kept).append(line + b"\n")
    if moved:
        with _named(removed), removed.open("ab") as file:
            file.write(b"".join(moved))
            file.flush()
            os.fsync(file.fileno())
    if b"".join(kept) != content:
        replace_text(path, b"".join(kept).decode())
    counts = {f"after step {step}": len(moved) - damaged, "damaged": damaged}
    words = [f"{count} {what}" for what, count in counts.items() if count]
    return f"{path}: moved lines to {removed.name}: {', '.join(words)}" if moved else ""


def _step_of(line: bytes) -> int | None:
    """The step of a line of metrics; None where it is damaged."""
    try:
        values = parse_json(line.decode())
    except ValueError:
        return None
    step = values.get("step") if isinstance(values, dict) else None
    return step if type(step) is int else None
