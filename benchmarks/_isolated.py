"""A program in a process group of its own, with a time limit."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

POLL = 0.5  # seconds between polls of what a program has written


class Ended(NamedTuple):
    """How a program ended.

    Attributes:
      status: its exit status, minus the signal that ended it; None where it was killed at its
        limit.
      seconds: that it ran.
    """

    status: int | None
    seconds: float


def run_isolated(
    command: Sequence[str | Path],
    *,
    limit: float,
    log: Path,
    environment: Mapping[str, str],
    watch: Callable[[], None] = lambda: None,
) -> Ended:
    """Runs a program, and kills it with all that it has started after `limit` seconds.

    Args:
      log: file for its output.
      watch: called now and then while it runs.
    """
    start = time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=dict(environment),
            start_new_session=True,
        )
    try:
        while (left := limit - (time.monotonic() - start)) > 0:
            with suppress(subprocess.TimeoutExpired):
                status = process.wait(timeout=min(POLL, left))
                return Ended(status, time.monotonic() - start)
            watch()
        return Ended(None, time.monotonic() - start)
    finally:
        _kill_group(process)


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    """Ends a process, and its children even where it ended before them."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with suppress(subprocess.TimeoutExpired):  # stuck in a driver: it is left there
        process.wait(timeout=10)
