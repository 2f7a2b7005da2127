import json
import resource

import numpy as np
import pytest

from hymba_jax.errors import HymbaError
from hymba_jax.training.metrics import MetricsWriter
from hymba_jax.training.run_start import RunStart


def lines(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def test_float32_values_come_back_exactly(tmp_path):
    values = np.random.default_rng(0).normal(size=100).astype(np.float32)
    with MetricsWriter(RunStart(tmp_path)) as writer:
        for step, value in enumerate(values, 1):
            writer.write(step, {"loss": float(value)})
    assert [np.float32(line["loss"]) for line in lines(tmp_path)] == list(values)


@pytest.mark.parametrize("tail", ["", '{"step": 4, "lo', "\x00\x00"])
def test_a_resumed_run_writes_each_step_once(tmp_path, tail):
    with MetricsWriter(RunStart(tmp_path)) as writer:
        for step in (1, 2, 3):
            writer.write(step, {"loss": float(step)})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(tail)
    with MetricsWriter(RunStart(tmp_path, 2)) as writer:
        for step in (3, 4):
            writer.write(step, {"loss": step + 0.5})
    assert lines(tmp_path) == [
        {"step": 1, "loss": 1.0},
        {"step": 2, "loss": 2.0},
        {"step": 3, "loss": 3.5},
        {"step": 4, "loss": 4.5},
    ]
    assert not list(tmp_path.glob("*.partial"))
    removed = (tmp_path / "metrics.removed.jsonl").read_text()
    assert removed == '{"step": 3, "loss": 3.0}\n' + (tail and tail + "\n")


DAMAGED = [
    b"[]",
    b"5",
    b"null",
    b'"text"',
    b"{}",
    b'{"step": "1"}',
    b'{"step": null}',
    b'{"step": true}',
    b'{"loss": \xff\xfe, "step": 1}',
    b'{"loss": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    b'{"step": ' + b"1" * 5000 + b"}",
    b"\x00\x00\x00",
]


@pytest.mark.parametrize("damage", DAMAGED, ids=[str(line[:20]) for line in DAMAGED])
def test_a_damaged_line_is_moved_and_no_other_is_lost(tmp_path, damage):
    good = [json.dumps({"step": step, "loss": step / 3}).encode() for step in (1, 2, 3)]
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"\n".join([good[0], damage, good[1], damage, good[2]]))  # no last line end
    said = []
    with MetricsWriter(RunStart(tmp_path, 3), said.append) as writer:
        writer.write(4, {"loss": 1.0})
    assert said == ["metrics.jsonl: moved lines to metrics.removed.jsonl: 2 damaged"]
    assert path.read_bytes().splitlines()[:-1] == good
    assert (tmp_path / "metrics.removed.jsonl").read_bytes() == 2 * (damage + b"\n")
    with MetricsWriter(RunStart(tmp_path, 4), pytest.fail):
        pass
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4]


def test_a_run_from_scratch_keeps_the_lines_of_the_one_before(tmp_path):
    said = []
    for run in range(3):
        with MetricsWriter(RunStart(tmp_path), said.append) as writer:
            for step in (1, 2):
                writer.write(step, {"loss": run + step / 4})
    assert [line.rpartition(": ")[2] for line in said] == 2 * ["2 after step 0"]
    removed = (tmp_path / "metrics.removed.jsonl").read_text().splitlines()
    assert [json.loads(line)["loss"] for line in removed] == [0.25, 0.5, 1.25, 1.5]
    assert [line["loss"] for line in lines(tmp_path)] == [2.25, 2.5]


def write_many(directory):
    with MetricsWriter(RunStart(directory, 1)) as writer:
        for step in range(2, 100):
            writer.write(step, {"loss": 1.0})


@pytest.mark.parametrize("full", ["metrics.jsonl", "metrics.removed.jsonl"])
def test_a_full_disk_is_one_line_whatever_it_fills(tmp_path, full):
    line = '{"step": 1}\n'
    (tmp_path / "metrics.jsonl").write_text(line * 300 if full == "metrics.jsonl" else "5\n")
    (tmp_path / "metrics.removed.jsonl").write_text(line * 300)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3601, before[1]))
    try:
        with pytest.raises(HymbaError) as caught:
            write_many(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert str(caught.value).startswith(f"{tmp_path}/{full}")
    assert "File too large" in str(caught.value)


def test_lines_are_readable_at_once(tmp_path):
    with MetricsWriter(RunStart(tmp_path)) as writer:
        writer.write(1, {"loss": 2.0})
        assert lines(tmp_path) == [{"step": 1, "loss": 2.0}]
