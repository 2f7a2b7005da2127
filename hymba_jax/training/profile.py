"""A trace of a few steps: `xprof --logdir RUN/profile` shows what devices and host did in them."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax

FOLDER = "profile"  # inside the run directory
_FIRST, _COUNT = 3, 5  # the first steps of a session differ from the others


class Tracer:
    """Traces some steps of this session, as a context; leaving it ends a trace under way.

    Args:
      directory: where the trace goes; nothing is traced if absent.
      start: updates done when the session begins.
    """

    def __init__(self, directory: Path | None, start: int):
        self._directory = directory
        self._steps = range(start + _FIRST, start + _FIRST + _COUNT)
        self._is_tracing = False

    @contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Runs a step, and names it in the trace."""
        if self._directory is not None and step == self._steps.start:
            jax.profiler.start_trace(self._directory)
            self._is_tracing = True
        if step == self._steps.stop:  # those before it have been waited for, but for the last
            self._stop()
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            yield

    def _stop(self) -> None:
        if self._is_tracing:
            self._is_tracing = False
            jax.profiler.stop_trace()

    def __enter__(self) -> "Tracer":
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()
