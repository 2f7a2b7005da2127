"""Checkpoints in emulated buckets: gs://, to which Orbax writes, and s3://, to which we upload."""

from pathlib import Path

import jax
import pytest
from checkpoint.test_checkpoint import abstract, assert_equal, loop, make_state
from storage_emulators import FORBIDDEN

from hymba_jax.checkpoint.checkpoints import PARAMS, _is_damage, load_params, silence_orbax
from hymba_jax.checkpoint.local_copy import local_copy
from hymba_jax.checkpoint.run_directory import check_output
from hymba_jax.checkpoint.uploaded_checkpoints import open_checkpoints
from hymba_jax.errors import HymbaError
from hymba_jax.remote import RemotePath
from hymba_jax.run_files import COMMITTED, checkpoint_steps

silence_orbax()
# As in test_checkpoint.py; gcsfs closes its sockets after its event loop.


@pytest.fixture
def run(bucket_url):
    """A run directory with checkpoints 2 and 3, and what a killed save of 4 left."""
    with open_checkpoints(bucket_url, keep=2) as checkpoints:
        for step in (2, 3):
            checkpoints.save(make_state(step), loop(step))
    directory = RemotePath(bucket_url)
    (directory / "checkpoints" / "4" / "params" / "d").write_bytes(b"partial")
    return directory


def test_the_newest_complete_one_comes_back_bit_for_bit(run):
    assert checkpoint_steps(run) == [2, 3]
    with open_checkpoints(str(run), keep=1, keep_steps=[3]) as checkpoints:
        state, restored_loop = checkpoints.restore(abstract(make_state()), print)
        checkpoints.save(make_state(4), loop(4))
    assert_equal(state, make_state(3))
    assert restored_loop == loop(3)
    assert checkpoint_steps(run) == [3, 4]
    assert_equal(load_params(run, abstract(make_state()).params), make_state(4).params)
    assert_equal(load_params(run, abstract(make_state()).params, 3), make_state(3).params)
    with pytest.raises(HymbaError, match=f"^{run}/checkpoints: no checkpoint 2; there are 3, 4$"):
        load_params(run, abstract(make_state()).params, 2)
    for step, expected in ((None, 4), (3, 3)):
        with local_copy(run, step, PARAMS) as copy:
            parts = [*(copy / "checkpoints").glob("*/*")]
            assert parts == [copy / "checkpoints" / str(expected) / "params"]
            assert_equal(
                load_params(copy, abstract(make_state()).params), make_state(expected).params
            )
        assert not copy.exists()
    with local_copy(run, 3) as copy:
        parts = {path.name for path in (copy / "checkpoints" / "3").iterdir() if path.is_dir()}
        assert parts == {"params", "optimizer", "loop"}
        assert checkpoint_steps(copy) == [3]


def test_a_damaged_one_is_set_aside_and_the_one_before_is_used(run):
    damaged = run / "checkpoints" / "3"
    for file in damaged.glob("params/d/*"):
        file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(HymbaError, match=f"^{damaged}/params: not parameters of this model"):
        load_params(run, abstract(make_state()).params)
    said = []
    with open_checkpoints(str(run), keep=2) as checkpoints:
        state, _ = checkpoints.restore(abstract(make_state()), said.append)
        checkpoints.save(make_state(3), loop(3))
    assert_equal(state, make_state(2))
    assert checkpoint_steps(run) == [2, 3]
    assert (run / "checkpoints" / "3.damaged-1" / "params" / "_METADATA").is_file()
    (line,) = said
    assert line.startswith(f"{damaged}/params: not a checkpoint of this model that can be read")
    assert line.endswith(": set aside as 3.damaged-1, step 2 is used")
    assert "\n" not in line


def test_a_store_that_is_not_reached_is_no_damage(bucket_url):
    path = RemotePath(bucket_url)
    for error in (ValueError("UNAVAILABLE: Error reading"), OSError("Forbidden: o/a"), Timeout()):
        assert not _is_damage(wrapped(error), path)
        assert _is_damage(wrapped(error), Path("checkpoint"))
    for error in (ValueError("INVALID_ARGUMENT: Error reading"), FileNotFoundError()):
        assert _is_damage(wrapped(error), path)


def wrapped(error):
    """The error as it arrives: the cause of one line."""
    line = HymbaError("not a checkpoint that can be read")
    line.__cause__ = error
    return line


class Timeout(Exception):
    """As of an HTTP library."""


def test_a_checkpoint_is_not_complete_before_all_of_it_is_there(run):
    (run / "checkpoints" / "3" / COMMITTED).unlink()
    assert checkpoint_steps(run) == [2]
    with open_checkpoints(str(run), keep=2) as checkpoints:
        assert checkpoints.restore(abstract(make_state()), print)[1].step == 2
        checkpoints.save(make_state(5), loop(5))  # waits for what Orbax removes in the background
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"2", "5"}


def test_without_permission(bucket_url):
    forbidden = bucket_url.replace("//bucket/", f"//{FORBIDDEN}/")
    with pytest.raises(HymbaError, match=f"^{forbidden}.*([Ff]orbidden|no permission)") as caught:  # noqa: SIM117
        with open_checkpoints(forbidden, keep=2) as checkpoints:
            checkpoints.save(make_state(1), loop(1))
    assert "\n" not in str(caught.value)


def test_only_one_process_writes_where_orbax_does_not(bucket_url, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    if bucket_url.startswith("gs"):
        check_output(bucket_url, "")
    else:
        with pytest.raises(HymbaError, match=f"^{bucket_url}: Orbax does not write there"):
            check_output(bucket_url, "")
