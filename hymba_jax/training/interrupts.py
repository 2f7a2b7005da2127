"""Signals that ask a run to stop: Ctrl-C, and SIGTERM.

Schedulers and clouds send SIGTERM some 30 seconds before they take a machine away, also for the
maintenance of TPUs. A run of several processes stops in all of them after the same step, whichever
got the signal. JAX's own preemption service does not do that: it takes SIGTERM away from Python
and knows no other signal.
"""

import os
import select
import signal
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from threading import Thread
from types import FrameType

from hymba_jax.errors import HymbaError
from hymba_jax.parallel.largest import LargestOfProcesses
from hymba_jax.run_files import checkpoint_steps

_NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}
_PATIENCE = 2.0  # seconds that Python has to end the program, if it gets a turn


class Interrupted(KeyboardInterrupt):
    """A signal asked the program to stop."""

    def __init__(self, number: int):
        self.number = number


class Interrupts:
    """The signals that this run has received.

    A signal raises `Interrupted` wherever the program is. Inside of `deferred`, where there is
    something to save, it only makes `poll` true.

    Attributes:
      agreed: the signal that all processes stop for; 0 before they do.
    """

    def __init__(self) -> None:
        self.agreed = 0
        self.is_deferred = False
        self._received = 0
        self._largest = LargestOfProcesses()

    def receive(self, number: int) -> None:
        """Takes a signal. Raises Interrupted outside of `deferred`, unless all are stopping."""
        self._received = number
        if not self.is_deferred and not self.agreed:
            raise Interrupted(number)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Inside, whoever polls stops; a signal that no process stopped for raises at the end."""
        self.is_deferred = True
        try:
            yield
        finally:
            self.is_deferred = False
        if self._received and not self.agreed:
            raise Interrupted(self._received)

    def poll(self) -> bool:
        """Whether to stop: the same in all processes, each of which must call this.

        With several processes a signal takes effect at the second call after it.
        """
        self.agreed = self.agreed or self._largest(self._received)
        return self.agreed != 0

    def exit_if_stopped(self) -> None:
        """Exits with the status of the signal that all processes stopped for, if there was one."""
        if self.agreed:
            sys.exit(128 + self.agreed)


@contextmanager
def one_line_interrupts(output: str) -> Iterator[Interrupts]:
    """Handles Ctrl-C and SIGTERM in the body, and says in one line where the run resumes.

    `Interrupted` exits with the status 128 + signal; after an agreed stop the caller does. A
    second signal exits immediately. Ignored signals, as in a shell's background, stay ignored.

    Args:
      output: the run directory.
    """
    interrupts = Interrupts()
    before = {number: signal.getsignal(number) for number in _NAMES}
    handled = [number for number in _NAMES if before[number] is not signal.SIG_IGN]

    def receive(number: int, _: FrameType | None) -> None:
        for each in handled:
            signal.signal(each, signal.SIG_DFL)
        interrupts.receive(number)

    for number in handled:
        signal.signal(number, receive)
    try:
        with _exits_without_python(interrupts, handled, output):
            yield interrupts
        if interrupts.agreed:
            _say(interrupts.agreed, output)
    except Interrupted as interrupt:
        _say(interrupt.number, output)
        sys.exit(128 + interrupt.number)
    finally:
        for number in handled:
            signal.signal(number, before[number] or signal.SIG_DFL)  # None: set by no Python code


@contextmanager
def _exits_without_python(
    interrupts: Interrupts, numbers: Collection[int], output: str
) -> Iterator[None]:
    """Exits for a signal though the main thread is busy outside of Python, such as in XLA.

    The operating system's handler, which does not wait for Python, writes to a pipe.
    """
    reading, writing = os.pipe()
    os.set_blocking(writing, False)

    def watch() -> None:
        first = _read_signal(reading, numbers, None)
        patience = None if interrupts.is_deferred else _PATIENCE
        if first and _read_signal(reading, numbers, patience) != 0:
            _say(first, output)
            os._exit(128 + first)

    thread = Thread(target=watch, daemon=True)
    thread.start()
    before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(writing)
        thread.join()
        os.close(reading)


def _read_signal(reading: int, numbers: Collection[int], patience: float | None) -> int | None:
    """The next of these signals from a pipe; 0 if it was closed, None after so many seconds."""
    while select.select([reading], [], [], patience)[0]:
        byte = os.read(reading, 1)
        if not byte or byte[0] in numbers:
            return byte[0] if byte else 0
    return None


def _say(number: int, output: str) -> None:
    line = f"\nstopped by {_NAMES[signal.Signals(number)]}: {_what_follows(output)}"
    print(line, file=sys.stderr, flush=True)


def _what_follows(output: str) -> str:
    try:
        steps = checkpoint_steps(output)
    except HymbaError as error:  # a bucket that cannot be reached
        return f"the same command resumes the run, of which nothing is known now ({error})"
    if steps:
        return f"the same command resumes {output} from step {steps[-1]}"
    return f"{output} has no checkpoint yet, the same command starts from scratch"
