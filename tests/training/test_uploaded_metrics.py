"""Metrics of runs in emulated buckets."""

import json

import pytest
from storage_emulators import on_one_store

from hymba_jax.remote import RemotePath
from hymba_jax.training import uploaded_metrics
from hymba_jax.training.uploaded_metrics import open_metrics


@pytest.fixture
def run(bucket_url):
    return RemotePath(bucket_url)


def steps(run, name="metrics.jsonl"):
    return [json.loads(line)["step"] for line in (run / name).read_bytes().splitlines()]


def test_lines_are_there_after_a_flush_and_at_the_end(run):
    with open_metrics(run, 0) as writer:
        writer.write(1, {"loss": 1.0})
        writer.flush()
        writer.write(2, {"loss": 2.0})
        assert steps(run) == [1]
    assert steps(run) == [1, 2]
    assert len([*(run / "tensorboard").iterdir()]) == 1


@on_one_store
def test_a_resumed_run_keeps_the_lines_that_its_checkpoint_covers(run):
    with open_metrics(run, 0) as writer:
        for step in (1, 2, 3):
            writer.write(step, {"loss": 1.0})
    with open_metrics(run, 2) as writer:
        moved = f"{run}/metrics.jsonl: moved lines to metrics.removed.jsonl: 1 after step 2"
        assert writer.removed == moved
        assert (steps(run), steps(run, "metrics.removed.jsonl")) == ([1, 2], [3])
        writer.write(3, {"loss": 0.5})
    assert steps(run) == [1, 2, 3]
    assert len([*(run / "tensorboard").iterdir()]) == 2


@on_one_store
def test_lines_are_uploaded_from_time_to_time(run, monkeypatch):
    with open_metrics(run, 0) as writer:
        writer.write(1, {"loss": 1.0})
        monkeypatch.setattr(uploaded_metrics, "_PERIOD", 0)
        writer.write(2, {"loss": 1.0})
        assert steps(run) == [1, 2]
