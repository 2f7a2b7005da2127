import os
import signal
import subprocess
import sys
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


def test_a_deferred_signal_is_told_where_the_run_polls(tmp_path, capsys):
    """And one that comes while the checkpoint is saved, as other processes get it, too late."""
    (tmp_path / "checkpoints" / "3").mkdir(parents=True)
    with one_line_interrupts(str(tmp_path)) as interrupts:
        with interrupts.deferred():
            assert not interrupts.poll()
            os.kill(os.getpid(), signal.SIGTERM)
            assert interrupts.poll()
        interrupts.receive(signal.SIGINT)
    assert "stopped by SIGTERM: the same command resumes" in capsys.readouterr().err
    with pytest.raises(SystemExit) as exit:
        interrupts.exit_if_stopped()
    assert exit.value.code == 128 + signal.SIGTERM


def test_a_deferred_signal_that_nobody_polled_ends_the_run_after_all(tmp_path, capsys):
    reached = []

    def run():
        with one_line_interrupts(str(tmp_path)) as interrupts:
            with interrupts.deferred():
                os.kill(os.getpid(), signal.SIGTERM)
                reached.append("the end")
            reached.append("more")

    with pytest.raises(SystemExit) as exit:
        run()
    assert reached == ["the end"]
    assert exit.value.code == 128 + signal.SIGTERM
    assert "has no checkpoint yet" in capsys.readouterr().err


BUSY = """
import hashlib, sys
from hymba_jax.training import interrupts
interrupts._PATIENCE = 0.1
with interrupts.one_line_interrupts(sys.argv[1]) as current:
    current.is_deferred = sys.argv[2] == "deferred"
    print("ready", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)  # in C, without Python's lock
"""


@pytest.mark.parametrize("phase", ["compiling", "deferred"])
def test_signals_end_a_program_that_is_busy_outside_of_python(tmp_path, phase):
    """The first one if there is nothing to save, else the second."""
    command = [sys.executable, "-c", BUSY, str(tmp_path), phase]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGTERM)
        if phase == "deferred":
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(0.3)
            process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=30)
    if phase == "deferred" and not said:  # the first came before the program was busy
        assert process.returncode == -signal.SIGINT
    else:
        assert process.returncode == 128 + signal.SIGTERM
        assert said.endswith(b"has no checkpoint yet, the same command starts from scratch\n")


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
