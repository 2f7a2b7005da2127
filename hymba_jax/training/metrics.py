"""The metrics of a run: `metrics.jsonl`, one JSON line per logged step, and the trackers."""

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from hymba_jax.closing import Closing
from hymba_jax.errors import HymbaError
from hymba_jax.files import open_regular, parse_json, replace_text
from hymba_jax.training.run_start import RunStart
from hymba_jax.training.trackers import Tracker

JSON_LINES = "metrics.jsonl"
REMOVED = "metrics.removed.jsonl"


class MetricsWriter(Closing):
    """Writes the metrics of a run to `JsonLines`, its record, and to trackers, as a context.

    A tracker that fails must not stop the training: it is reported once, and left out from then on.
    Only at the start of a new run, while somebody is there to fix it, its failure is an error.

    Args:
      run: nothing is written if absent.
      say: is told of trackers that are left out, and of lines that are moved.
      trackers: by the names that the config has for them.

    Raises:
      HymbaError: a file of `JsonLines` cannot be read or written, or a tracker cannot be started;
        `write` and the end of the context do, too.
    """

    def __init__(
        self,
        run: RunStart | None,
        say: Callable[[str], None] = print,
        trackers: Mapping[str, Tracker] = {},
    ):
        self._say = say
        self._lines = JsonLines(say) if run else None
        self._trackers: dict[str, Tracker] = {}
        if self._lines is None or run is None:
            return
        self._lines.start(run)
        for name, tracker in trackers.items():
            try:
                tracker.start(run)
            except Exception as error:
                if not run.is_resumed:
                    self.close()
                    raise HymbaError(
                        f"tracking.{name}: cannot start ({_reason(error)}): fix it, or leave "
                        f"tracking.{name} out"
                    ) from error
                self._report(name, "cannot start", error)
            else:
                self._trackers[name] = tracker

    def write(self, step: int, metrics: Mapping[str, int | float | str]) -> None:
        """Records these metrics of a step; a float reads back from the JSON as the same float."""
        if self._lines is None:
            return
        self._lines.write(step, metrics)
        for name, tracker in list(self._trackers.items()):
            try:
                tracker.write(step, metrics)
            except Exception as error:
                self._report(name, "failed", error)
                del self._trackers[name]

    def close(self) -> None:
        for name, tracker in self._trackers.items():
            try:
                tracker.close()
            except Exception as error:
                self._report(name, "failed at the end", error)
        if self._lines is not None:
            self._lines.close()

    def _report(self, name: str, what: str, error: Exception) -> None:
        self._say(
            f"tracking.{name} {what} ({_reason(error)}): left out until the run is started again"
        )


class JsonLines:
    """`metrics.jsonl` of a run directory.

    Lines after the step of the start, left by a run that stopped, and damaged lines are moved to
    `metrics.removed.jsonl`, so that the lines of a resumed run read as if it had never stopped.

    Args:
      say: is told what was moved.
    """

    def __init__(self, say: Callable[[str], None]):
        self._say = say

    def start(self, run: RunStart) -> None:
        self._path = run.directory / JSON_LINES
        with _named(self._path):
            removed = _keep_until(self._path, run.directory / REMOVED, run.step)
            self._file = self._path.open("ab", buffering=0)
        if removed:
            self._say(removed)

    def write(self, step: int, metrics: Mapping[str, int | float | str]) -> None:
        values = {name: None if _is_not_finite(value) else value for name, value in metrics.items()}
        content = (json.dumps({"step": step, **values}, allow_nan=False) + "\n").encode()
        with _named(self._path):
            while content:
                content = content[self._file.write(content) :]

    def close(self) -> None:
        self._file.close()


def _is_not_finite(value: object) -> bool:
    """Whether a value is a number that JSON does not have."""
    return isinstance(value, float) and not math.isfinite(value)


def last_step(run_directory: Path) -> int:
    """The last step that `metrics.jsonl` of a run has a line of; 0 without any."""
    lines = _split(_read(run_directory / JSON_LINES))
    return max((step for line in lines if (step := _step_of(line)) is not None), default=0)


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
    kept: list[bytes] = []
    moved: list[bytes] = []
    damaged = 0
    content = _read(path)
    for line in _split(content):
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
    return f"{path.name}: moved lines to {removed.name}: {', '.join(words)}" if moved else ""


def _read(path: Path) -> bytes:
    """The content of a file, if there is one."""
    try:
        with open_regular(path) as file:
            content: bytes = file.read()
    except FileNotFoundError:
        return b""
    return content


def _split(content: bytes) -> list[bytes]:
    """The lines that are not blank."""
    return [line for line in content.split(b"\n") if line.strip()]


def _step_of(line: bytes) -> int | None:
    """The step of a line of metrics; None where it is damaged."""
    try:
        values = parse_json(line.decode())
    except ValueError:
        return None
    step = values.get("step") if isinstance(values, dict) else None
    return step if type(step) is int else None


def _reason(error: Exception) -> str:
    """The first line of what an error says."""
    return str(error).strip().partition("\n")[0] or type(error).__name__
