import json
import struct

import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from hymba_jax.training.metrics import MetricsWriter


def lines(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def scalars(directory):
    """Tag, step and value of every scalar that TensorBoard would show."""
    found = []
    for file in (directory / "tensorboard").iterdir():
        data = file.read_bytes()
        while data:  # records of: length, its checksum, bytes, their checksum
            (length,) = struct.unpack("<Q", data[:8])
            event = Event.FromString(data[12 : 12 + length])
            found += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
            data = data[16 + length :]
    return found


def test_float32_values_come_back_exactly(tmp_path):
    values = np.random.default_rng(0).normal(size=100).astype(np.float32)
    with MetricsWriter(tmp_path, 0) as writer:
        for step, value in enumerate(values, 1):
            writer.write(step, {"loss": float(value)})
    assert [np.float32(line["loss"]) for line in lines(tmp_path)] == list(values)
    assert scalars(tmp_path) == [("loss", i, float(v)) for i, v in enumerate(values, 1)]


@pytest.mark.parametrize("tail", ["", '{"step": 4, "lo', "\x00\x00"])
def test_a_resumed_run_writes_each_step_once(tmp_path, tail):
    with MetricsWriter(tmp_path, 0) as writer:
        for step in (1, 2, 3):
            writer.write(step, {"loss": float(step)})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(tail)
    with MetricsWriter(tmp_path, 2) as writer:
        for step in (3, 4):
            writer.write(step, {"loss": step + 0.5})
    assert lines(tmp_path) == [
        {"step": 1, "loss": 1.0},
        {"step": 2, "loss": 2.0},
        {"step": 3, "loss": 3.5},
        {"step": 4, "loss": 4.5},
    ]
    assert not list(tmp_path.glob("*.partial"))


def test_lines_are_readable_at_once(tmp_path):
    with MetricsWriter(tmp_path, 0) as writer:
        writer.write(1, {"loss": 2.0})
        assert lines(tmp_path) == [{"step": 1, "loss": 2.0}]
