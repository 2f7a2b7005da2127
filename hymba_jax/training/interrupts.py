"""Ctrl-C and SIGTERM: they end a run with one line that names the step to resume from."""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from hymba_jax.errors import HymbaError
from hymba_jax.run_files import checkpoint_steps

_NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}


class Interrupted(KeyboardInterrupt):
    """A signal asked the program to stop."""

    def __init__(self, number: signal.Signals):
        self.number = number


@contextmanager
def one_line_interrupts(output: str) -> Iterator[None]:
    """Unwinds the body at the first Ctrl-C or SIGTERM, then exits.

    A checkpoint that is being written is finished. A second signal exits immediately. Ignored
    signals, as in a shell's background, stay ignored.

    Args:
      output: the run directory.
    """

    def stop(number: int, _: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)
        raise Interrupted(signal.Signals(number))

    before = {number: signal.getsignal(number) for number in _NAMES}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, stop)
    try:
        yield
    except Interrupted as interrupt:
        print(f"\nstopped by {_NAMES[interrupt.number]}: {_what_follows(output)}", file=sys.stderr)
        sys.exit(128 + interrupt.number)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)  # None: set by no Python code


def _what_follows(output: str) -> str:
    try:
        steps = checkpoint_steps(output)
    except HymbaError as error:  # a bucket that cannot be reached
        return f"the same command resumes {output}, of which nothing is known now ({error})"
    if steps:
        return f"the same command resumes {output} from step {steps[-1]}"
    return f"{output} has no checkpoint yet, the same command starts from scratch"
