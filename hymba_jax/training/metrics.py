"""What a run writes down: one JSON line a logged step, and the same to TensorBoard."""

import contextlib
import json
import os
import secrets
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.record_writer import masked_crc32c
from tensorboardX.summary import scalar

from hymba_jax.errors import HymbaError
from hymba_jax.files import open_regular, parse_json, replace_text

JSON_LINES = "metrics.jsonl"
REMOVED = "metrics.removed.jsonl"
TENSORBOARD = "tensorboard"


class MetricsWriter:
    """Appends to `metrics.jsonl` and `tensorboard/` of a run directory, as a context.

    Whatever was written there after `step`, by a run that stopped, and lines that are damaged are
    moved to `metrics.removed.jsonl`, so that the lines of a resumed run read as if it had never
    stopped, and nothing is lost.

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
        self._files: list[_AppendedFile] = []
        if run_directory is None:
            return
        lines, board = run_directory / JSON_LINES, run_directory / TENSORBOARD
        with _named(lines):
            self.removed = _keep_until(lines, run_directory / REMOVED, step)
        with _named(board):
            board.mkdir(exist_ok=True)
        with contextlib.ExitStack() as opened:
            self._lines = opened.enter_context(_AppendedFile(lines))
            name = f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}"
            events = _AppendedFile(board / f"{name}.{secrets.token_hex(4)}")
            self._events = opened.enter_context(events)
            self._events.write(_record(Event(wall_time=time.time(), file_version="brain.Event:2")))
            # TensorBoard hides what earlier files have from this step on.
            start = Event(step=step + 1, session_log=SessionLog(status=SessionLog.START))
            self._events.write(_record(start))
            opened.pop_all()
        self._files = [self._lines, self._events]

    def write(self, step: int, values: dict[str, float]) -> None:
        """Records these values of a step; a float reads back from the JSON as the same float."""
        if not self._files:
            return
        self._lines.write((json.dumps({"step": step, **values}) + "\n").encode())
        now = time.time()
        events = [
            Event(wall_time=now, step=step, summary=scalar(name, value))
            for name, value in values.items()
        ]
        self._events.write(b"".join(map(_record, events)))

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for file in self._files:
            file.close()


class _AppendedFile:
    """A file whose every write is in the operating system's hands when it returns.

    Without a buffer, and without the thread of TensorBoard's own writers, which dies on a full
    disk and leaves the program waiting for it.
    """

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

    def __enter__(self) -> "_AppendedFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """Turns an error of the operating system into one line about `path`."""
    try:
        yield
    except OSError as error:
        raise HymbaError(
            f"{path}: cannot be written ({error.strerror}): see that the disk has room and can be "
            "written to, then run the same command again"
        ) from error


def _record(event: Event) -> bytes:
    """An event as TensorBoard's files have it: length, its checksum, bytes, their checksum."""
    content = event.SerializeToString()
    length = struct.pack("<Q", len(content))
    checksums = [struct.pack("<I", masked_crc32c(part)) for part in (length, content)]
    return length + checksums[0] + content + checksums[1]


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
