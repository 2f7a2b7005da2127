import os
import signal
from collections.abc import Callable

import pytest

from hymba_jax.training.interrupts import one_line_interrupts


def run_and_signal(output, number, unwind: Callable[[], None]):
    """A run that is sent a signal; `unwind` is what it then does before it ends."""
    with one_line_interrupts(str(output)):
        try:
            os.kill(os.getpid(), number)
        finally:
            unwind()


@pytest.mark.parametrize(
    ("number", "name"), [(signal.SIGINT, "Ctrl-C"), (signal.SIGTERM, "SIGTERM")]
)
@pytest.mark.parametrize("steps", [[], ["3", "20"]])
def test_a_signal_ends_the_run_and_says_where_it_resumes(tmp_path, capsys, number, name, steps):
    handler = signal.getsignal(number)

    def finish():
        for step in steps:
            (tmp_path / "checkpoints" / step).mkdir(parents=True)

    with pytest.raises(SystemExit) as exit:
        run_and_signal(tmp_path, number, finish)
    assert exit.value.code == 128 + number
    assert signal.getsignal(number) is handler
    (line,) = capsys.readouterr().err.split("\n", 1)[1].splitlines()
    follows = (
        f"the same command resumes {tmp_path} from step 20"
        if steps
        else f"{tmp_path} has no checkpoint yet, the same command starts from scratch"
    )
    assert line == f"stopped by {name}: {follows}"


def test_a_second_signal_ends_the_program_at_once(tmp_path):
    handlers = []
    with pytest.raises(SystemExit):
        run_and_signal(
            tmp_path, signal.SIGTERM, lambda: handlers.append(signal.getsignal(signal.SIGTERM))
        )
    assert handlers == [signal.SIG_DFL]


def test_an_ignored_signal_stays_ignored(tmp_path):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with one_line_interrupts(str(tmp_path)):
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_handlers_come_back(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    with one_line_interrupts(str(tmp_path)):
        assert signal.getsignal(signal.SIGTERM) is not before
    assert signal.getsignal(signal.SIGTERM) is before
