import json
import time

import jax.numpy as jnp
import pytest

from hymba_jax.errors import HymbaError
from hymba_jax.training.config import TrainingConfig
from hymba_jax.training.display import Display, duration
from hymba_jax.training.metrics import MetricsWriter
from hymba_jax.training.recorder import Recorder
from hymba_jax.training.step import StepMetrics
from hymba_jax.training.utilisation import Workload

WORKLOAD = Workload(tokens=1000, flops=6e9, devices=4, peak_flops=4e12)
CONFIG = TrainingConfig(steps=6, log_every=2, warmup_fraction=0.5, decay_fraction=0.0)


@pytest.fixture
def recorder(tmp_path):
    with MetricsWriter(tmp_path, 0) as writer:
        yield Recorder(CONFIG, WORKLOAD, 0, writer, Display())


def metrics(loss, grad_norm=1.0):
    return StepMetrics(jnp.float32(loss), jnp.float32(grad_norm))


def steps(directory):
    return [
        json.loads(line)["step"] for line in (directory / "metrics.jsonl").read_text().splitlines()
    ]


def test_a_step_is_read_when_the_next_is_under_way(recorder, tmp_path, capsys):
    recorder.submit(1, metrics(3.0))
    recorder.submit(2, metrics(2.0))
    assert steps(tmp_path) == []
    recorder.submit(3, metrics(1.0))
    assert steps(tmp_path) == [2]
    assert "step 2/6  loss 2.0000  validation - bits/byte" in capsys.readouterr().out


def test_validation_joins_the_line_of_its_step(recorder, tmp_path, capsys):
    recorder.submit(3, metrics(2.5))
    with recorder.paused():
        pass
    recorder.flush({"validation_loss": 2.0, "validation_bits_per_byte": 1.25})
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    values = json.loads(line)
    speed = values.pop("tokens_per_second")
    assert speed > 0
    assert values.pop("tokens_per_second_per_device") == pytest.approx(speed / 4, abs=0.1)
    assert values.pop("mfu") == pytest.approx(6e9 / 1000 * speed / 4e12, abs=1e-4)
    assert values == {
        "step": 3,
        "loss": 2.5,
        "grad_norm": 1.0,
        "learning_rate": pytest.approx(3e-3),
        "input_seconds": 0.0,
        "checkpoint_seconds": 0.0,
        "validation_loss": 2.0,
        "validation_bits_per_byte": 1.25,
    }
    recorder.submit(4, metrics(2.0))
    recorder.flush()
    assert "step 4/6  loss 2.0000  validation 1.2500 bits/byte" in capsys.readouterr().out


def test_time_is_lost_where_the_devices_have_nothing_to_do(recorder, tmp_path):
    with recorder.waiting_for("checkpoint"):  # before the first step
        time.sleep(0.02)
    recorder.submit(2, metrics(2.0))
    unfinished = type("Unfinished", (), {"is_ready": lambda self: False})()
    recorder._pending = 2, StepMetrics(unfinished, None)
    with recorder.waiting_for("input"):
        time.sleep(0.02)
    recorder._pending = 2, metrics(2.0)
    recorder.flush()
    values = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert values["checkpoint_seconds"] >= 0.02
    assert values["input_seconds"] == 0


@pytest.mark.parametrize(("loss", "grad_norm"), [("nan", 1.0), ("inf", 1.0), (2.0, "nan")])
def test_a_run_that_diverged_stops_with_the_step_and_what_to_look_at(
    recorder, tmp_path, loss, grad_norm
):
    recorder.submit(2, metrics(float(loss), float(grad_norm)))
    with pytest.raises(HymbaError, match=r"step 2: .*nan|inf.*learning rate 0.002: look at"):
        recorder.flush()
    assert steps(tmp_path) == []


def test_durations_are_hours_minutes_seconds():
    assert [duration(s) for s in (0.4, 61.0, 108000.0)] == ["0:00:00", "0:01:01", "1 day, 6:00:00"]
