"""Metrics of runs in emulated buckets."""

import json
from contextlib import contextmanager

import pytest
from storage_emulators import on_one_store

from hymba_jax.remote import RemotePath
from hymba_jax.training import uploaded_records
from hymba_jax.training.metrics import MetricsWriter
from hymba_jax.training.run_start import RunStart
from hymba_jax.training.uploaded_records import open_records


@pytest.fixture
def run(bucket_url):
    return RemotePath(bucket_url)


def steps(run, name="metrics.jsonl"):
    return [json.loads(line)["step"] for line in (run / name).read_bytes().splitlines()]


@contextmanager
def writing(run, step, said=None):
    """Records of a run in a bucket, and the writer of its metrics."""
    say = [].append if said is None else said.append
    with open_records(run) as records:
        start = RunStart(records.directory, step, is_resumed=step > 0)
        with MetricsWriter(start, say) as writer:
            yield records, writer


def test_lines_are_there_after_a_flush_and_at_the_end(run):
    with writing(run, 0) as (records, writer):
        writer.write(1, {"loss": 1.0})
        records.flush()
        writer.write(2, {"loss": 2.0})
        assert steps(run) == [1]
    assert steps(run) == [1, 2]


@on_one_store
def test_a_resumed_run_keeps_the_lines_that_its_checkpoint_covers(run):
    with writing(run, 0) as (_, writer):
        for step in (1, 2, 3):
            writer.write(step, {"loss": 1.0})
    said = []
    with writing(run, 2, said) as (records, writer):
        assert said == ["metrics.jsonl: moved lines to metrics.removed.jsonl: 1 after step 2"]
        records.flush()
        assert (steps(run), steps(run, "metrics.removed.jsonl")) == ([1, 2], [3])
        writer.write(3, {"loss": 0.5})
    assert steps(run) == [1, 2, 3]


@on_one_store
def test_lines_are_uploaded_from_time_to_time(run, monkeypatch):
    with writing(run, 0) as (records, writer):
        writer.write(1, {"loss": 1.0})
        records.flush_if_due()
        assert not (run / "metrics.jsonl").exists()
        monkeypatch.setattr(uploaded_records, "_PERIOD", 0)
        records.flush_if_due()
        assert steps(run) == [1]
