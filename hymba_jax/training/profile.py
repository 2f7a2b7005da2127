"""A trace of a few steps: `xprof --logdir RUN/profile` shows what devices and host did in them."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax

from hymba_jax.closing import Closing
from hymba_jax.errors import HymbaError

FOLDER = "profile"  # inside the run directory
_FIRST, _COUNT = 3, 5  # skip the first steps of a session, which are atypical


class Tracer(Closing):
    """Traces some steps of this session, as a context; leaving it ends a trace under way.

    Args:
      directory: where the trace goes; nothing is traced if absent.
      start: updates done when the session begins.

    Raises:
      HymbaError: in `step` and at the end of the context, if the trace cannot be written.
    """

    def __init__(self, directory: Path | None, start: int):
        self._directory = directory
        self._steps = range(start + _FIRST, start + _FIRST + _COUNT)
        self._is_tracing = False

    @contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Runs a step, and names it in the trace."""
        if self._directory is not None and step == self._steps.start:
            with _one_line(self._directory):
                jax.profiler.start_trace(self._directory)
            self._is_tracing = True
        if step == self._steps.stop:  # earlier steps are complete, except for the last
            self.close()
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            yield

    def close(self) -> None:
        """Ends a trace under way."""
        if self._is_tracing:
            assert self._directory is not None
            self._is_tracing = False
            with _one_line(self._directory):
                jax.profiler.stop_trace()


@contextmanager
def _one_line(directory: Path) -> Iterator[None]:
    """Turns what the profiler raises, such as on a full disk, into one line."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise HymbaError(f"{directory}: the profile cannot be written ({reason})") from error
