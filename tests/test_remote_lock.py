"""The lock of a directory in an emulated bucket: held, released, expired, and lost."""

import os
import threading
from contextlib import ExitStack

import pytest
from storage_emulators import on_one_store

from hymba_jax import remote_lock
from hymba_jax.checkpoint.run_lock import LOCK, locked
from hymba_jax.errors import HymbaError
from hymba_jax.remote import RemotePath


@pytest.fixture
def run(bucket_url, monkeypatch):
    monkeypatch.setattr(remote_lock, "RENEWAL", 0.1)
    monkeypatch.setattr(remote_lock, "EXPIRY", 1.0)
    return RemotePath(bucket_url) / "run"


def leave_behind(run, number=1):
    """The lock of a process that was killed."""
    (run / LOCK / str(number)).write_bytes(b"process 1 on host since then\n")


def test_the_holder_is_named_and_the_end_releases(run):
    said = []
    by = rf"^{run}: a run is writing there \(process {os.getpid()} on \S+ since .*\): wait for it"
    with locked(run, said.append), pytest.raises(HymbaError, match=by), locked(run, said.append):
        pass
    assert not run.exists()
    with locked(run, said.append):
        assert [path.name for path in (run / LOCK).iterdir()] == ["1"]
    assert [line.partition(" (")[0] for line in said] == [
        f"{run}: waiting up to 1 s to see whether the run there has died"
    ]


@on_one_store
def test_a_lock_that_is_not_renewed_is_taken_over(run):
    leave_behind(run, 7)
    with locked(run, lambda _: None):
        assert max(remote_lock._numbers(run / LOCK)) == 8
    assert not run.exists()


@on_one_store
def test_a_lock_is_taken_over_from_a_process_that_took_it_over(run):
    leave_behind(run, 1)
    leave_behind(run, 2)
    with locked(run, lambda _: None):
        assert max(remote_lock._numbers(run / LOCK)) == 3
    assert not run.exists()


def test_one_of_several_takes_over(run):
    leave_behind(run)
    start, refused, holders = threading.Barrier(4), [], []
    with ExitStack() as held:

        def take():
            start.wait()
            try:
                holders.append(held.enter_context(locked(run, lambda _: None)))
            except HymbaError as error:
                refused.append(str(error))

        threads = [threading.Thread(target=take) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert (len(holders), len(refused)) == (1, 3)


@on_one_store
def test_whoever_was_created_meanwhile_wins(run, monkeypatch):
    """One that found an expired lock, and one that found none as it was removed in between."""
    numbers = iter([set(), {1, 6}])
    monkeypatch.setattr(remote_lock, "_numbers", lambda _: next(numbers))
    leave_behind(run, 6)
    with pytest.raises(HymbaError, match="a run is writing there"), locked(run, print):
        pass
    assert [path.name for path in (run / LOCK).iterdir()] == ["6"]


@on_one_store
def test_who_loses_it_exits(run, monkeypatch):
    exits, exited = [], threading.Event()

    def leave(message):
        exits.append(message)
        exited.set()

    monkeypatch.setattr(remote_lock, "_exit", leave)
    with locked(run, print):
        leave_behind(run, 2)
        assert exited.wait(10)
    assert exits[0] == f"{run}: another run took over: this one was cut off too long"


@on_one_store
def test_without_the_store_the_lock_is_renewed_later(run, monkeypatch):
    failing, write = threading.Event(), RemotePath.write_bytes
    failed = threading.Event()

    def fail(path, content):
        if not failing.is_set():
            return write(path, content)
        failed.set()
        raise HymbaError("unreachable")

    monkeypatch.setattr(RemotePath, "write_bytes", fail)
    with locked(run, print):
        failing.set()
        assert failed.wait(10)
        failing.clear()
        by = "a run is writing there"
        with pytest.raises(HymbaError, match=by), locked(run, lambda _: None):
            pass
