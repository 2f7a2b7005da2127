"""A trace of a few steps: `xprof --logdir RUN/profile` shows what devices and host did in them."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import jax

from hymba_jax.closing import Closing
from hymba_jax.errors import HymbaError
from hymba_jax.files import Location, written_into

FOLDER = "profile"  # inside the run directory
_FIRST, _COUNT = 3, 5  # skip the first steps of a session, which are atypical, if there are more


class Tracer(Closing):
    """Traces some steps of this session, as a context; leaving it ends a trace under way.

    Args:
      directory: where the trace goes; nothing is traced if absent.
      start: updates done when the session begins.
      stop: those when it ends, if nothing stops it before.

    Raises:
      HymbaError: in `step` and at the end of the context, if the trace cannot be written.
    """

    def __init__(self, directory: Location | None, start: int, stop: int):
        self._directory = directory
        self._trace = ExitStack()  # the one under way
        self._steps = range(min(start + _FIRST, stop), start + _FIRST + _COUNT)

    @contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Runs a step, and names it in the trace."""
        if self._directory is not None and step == self._steps.start:
            with _one_line(self._directory), ExitStack() as begun:
                local = begun.enter_context(written_into(self._directory))
                jax.profiler.start_trace(local)
                begun.callback(jax.profiler.stop_trace)
                self._trace = begun.pop_all()
        if step == self._steps.stop:  # earlier steps are complete, except for the last
            self.close()
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            yield

    def close(self) -> None:
        """Ends a trace under way."""
        if self._directory is not None:
            with _one_line(self._directory):
                self._trace.close()


@contextmanager
def _one_line(directory: Location) -> Iterator[None]:
    """Turns what the profiler raises, such as on a full disk, into one line."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise HymbaError(f"{directory}: the profile cannot be written ({reason})") from error
