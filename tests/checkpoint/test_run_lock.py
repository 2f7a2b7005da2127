"""The lock of a run directory: within a process, between processes, and after a death."""

import fcntl
import os
import signal
import subprocess
import sys

import pytest

from hymba_jax.checkpoint.run_lock import LOCK, check_unlocked, locked
from hymba_jax.errors import HymbaError

HOLDER = """
import sys
from pathlib import Path
from hymba_jax.checkpoint.run_lock import locked

with locked(Path(sys.argv[1]), print):
    print("locked", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock of `run`."""
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "run")]
    path = os.pathsep.join(filter(None, sys.path))
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": path},
    ) as process:
        assert process.stdout.readline() == "locked\n"
        yield process
        process.kill()


def test_another_process_is_named_and_refused(holder, tmp_path):
    run = tmp_path / "run"
    by = rf"^{run}: a run is writing there \(process {holder.pid} on \S+ since \d{{4}}-.*\): wait"
    with pytest.raises(HymbaError, match=by), locked(run, print):
        pass
    with pytest.raises(HymbaError, match=by):
        check_unlocked(run)
    (tmp_path / "link").symlink_to(run)
    with (
        pytest.raises(HymbaError, match="a run is writing there"),
        locked(tmp_path / "link", print),
    ):
        pass


def test_death_releases_it(holder, tmp_path):
    run = tmp_path / "run"
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert (run / LOCK).exists()
    check_unlocked(run)
    with locked(run, print):
        assert f"process {os.getpid()} on " in (run / LOCK).read_text()
    assert [*run.iterdir()] == []


def test_the_end_releases_it(holder, tmp_path):
    holder.communicate("")
    assert not (tmp_path / "run").exists()  # nothing was written there
    with locked(tmp_path / "run", print):
        pass


def test_the_same_process_is_refused_and_keeps_its_lock(tmp_path):
    run = tmp_path / "run"
    with locked(run, print):
        (tmp_path / "link").symlink_to(run)
        for directory in (run, tmp_path / "link"):
            with (
                pytest.raises(HymbaError, match=r"a run is writing there \(this process\)"),
                locked(directory, print),
            ):
                pass
            with pytest.raises(HymbaError, match="this process"):
                check_unlocked(directory)
        # Had one of these closed the file, another process could lock it now.
        wait = (
            "import fcntl, sys; fcntl.lockf(open(sys.argv[1], 'a'), fcntl.LOCK_EX | fcntl.LOCK_NB)"
        )
        command = [sys.executable, "-c", wait, str(run / LOCK)]
        assert subprocess.run(command, capture_output=True, check=False).returncode == 1
    with locked(run, print):
        pass


def test_what_is_left_empty_is_removed(tmp_path):
    with pytest.raises(HymbaError, match="refused"), locked(tmp_path / "a" / "b", print):
        raise HymbaError("refused")
    assert [*tmp_path.iterdir()] == []
    with locked(tmp_path / "a" / "b", print):
        (tmp_path / "a" / "b" / "written").touch()
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["written"]
    (tmp_path / "own").mkdir()
    with locked(tmp_path / "own", print):
        pass
    assert (tmp_path / "own").is_dir()


def test_a_file_system_without_locks_is_a_warning(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "lockf", no_locks)
    said = []
    with locked(tmp_path / "run", said.append):
        pass
    assert said == [
        f"{tmp_path}/run: its file system has no locks (Function not implemented): nothing keeps "
        "another run from writing there"
    ]


def test_no_directory_or_no_run_is_unlocked(tmp_path):
    check_unlocked(tmp_path)
    check_unlocked(tmp_path / "gone")
