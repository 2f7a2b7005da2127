import dataclasses
import json
import math

import jax.numpy as jnp
import pytest

from hymba_jax.display import Display, duration
from hymba_jax.errors import HymbaError
from hymba_jax.training.loss import Average
from hymba_jax.training.metrics import MetricsWriter
from hymba_jax.training.mfu import Workload
from hymba_jax.training.recorder import Recorder, RecorderState, StageRecords
from hymba_jax.training.run_start import RunStart

WORKLOAD = Workload(tokens=1000, flops=6e9, devices=4, peak_flops=4e12)
STEPS, LOG_EVERY = 6, 2


def new_recorder(writer, *state):
    recorder = Recorder(STEPS, LOG_EVERY, writer, Display(), *state)
    recorder.begin_stage(
        StageRecords(
            name="",
            start=0,
            tokens_before=0,
            workload=WORKLOAD,
            data_progress=lambda step: {"epoch": step / 8},
            name_data=lambda step: f"data {step}",
        )
    )
    return recorder


@pytest.fixture
def recorder(tmp_path):
    with MetricsWriter(RunStart(tmp_path)) as writer:
        yield new_recorder(writer)


def metrics(loss, grad_norm=1.0, tokens=1000, learning_rate=2e-3):
    return {
        "loss": Average(jnp.float32(loss) * tokens, jnp.int32(tokens)),
        "grad_norm": Average(jnp.float32(grad_norm), 1),
        "learning_rate": jnp.float32(learning_rate),
    }


def lines(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def steps(directory):
    return [line["step"] for line in lines(directory)]


class Clock:
    """In place of the module time: it moves when it is told to."""

    now = 100.0

    def monotonic(self):
        return self.now


class Unfinished:
    """A sum that a device computes until a time, in place of an array; reading it waits."""

    def __init__(self, clock, done):
        self.clock, self.done = clock, done

    def is_ready(self):
        return self.clock.now >= self.done

    def block_until_ready(self):
        self.clock.now = max(self.clock.now, self.done)

    def __float__(self):
        self.block_until_ready()
        return 2000.0


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr("hymba_jax.training.recorder.time", clock)
    return clock


def test_a_step_is_read_when_the_next_is_under_way(recorder, tmp_path, capsys):
    recorder.submit(1, metrics(3.0))
    recorder.submit(2, metrics(2.0))
    assert steps(tmp_path) == []
    recorder.submit(3, metrics(1.0))
    assert steps(tmp_path) == [2]
    assert "step 2/6  33%  loss 2.5000  " in capsys.readouterr().out


def test_validation_joins_the_line_of_its_step(recorder, tmp_path, capsys):
    recorder.submit(1, metrics(2.5))
    recorder.flush({"validation_loss": 2.0, "validation_bits_per_byte": 1.25})
    (values,) = lines(tmp_path)
    speed = values.pop("tokens_per_second")
    assert speed > 0
    assert values.pop("tokens_per_second_per_device") == pytest.approx(speed / 4, abs=0.1)
    assert values.pop("mfu") == pytest.approx(6e9 / 1000 * speed / 4e12, abs=1e-4)
    assert values == {
        "step": 1,
        "loss": 2.5,
        "grad_norm": 1.0,
        "learning_rate": pytest.approx(2e-3),
        "tokens_seen": 1000,
        "epoch": 0.125,
        "input_seconds": 0.0,
        "checkpoint_seconds": 0.0,
        "validation_loss": 2.0,
        "validation_bits_per_byte": 1.25,
    }
    recorder.submit(2, metrics(2.0))
    recorder.flush()
    shown = capsys.readouterr().out
    assert "step 1/6  17%  loss 2.5000  val 1.2500 bpb" in shown
    assert "step 2/6  33%  loss 2.0000  val 1.2500 bpb" in shown  # the last one


def test_a_validation_without_text_is_shown_by_its_loss(recorder, capsys):
    recorder.submit(1, metrics(2.5))
    recorder.flush({"validation_loss": 1.5})
    assert "step 1/6  17%  loss 2.5000  val loss 1.5000  " in capsys.readouterr().out


def test_losses_of_another_objective_are_not_compared(recorder, capsys):
    """Neither is the last validation shown, nor is a higher loss a spike."""
    for step in range(1, 40):
        recorder.submit(step, metrics(0.5))
    recorder.flush({"validation_loss": 1.5})
    capsys.readouterr()
    recorder.forget_losses()
    recorder.submit(40, metrics(5.0))
    recorder.flush()
    shown = capsys.readouterr().out
    assert "step 40/6" in shown
    assert "val" not in shown
    assert "spike" not in shown


def test_a_line_is_about_all_steps_since_the_line_before(recorder, tmp_path):
    for step, loss, norm, tokens in ((1, 3.0, 1.0, 100), (2, 2.0, 3.0, 300), (3, 5.0, 7.0, 10)):
        reward = Average(jnp.float32(step), jnp.int32(4 // step))  # 1, 2, 3 over 4, 2, 1
        values = metrics(loss, norm, tokens, learning_rate=step)
        recorder.submit(step, values | {"reward": reward})
    recorder.flush({"validation_bits_per_byte": 1.0})
    first, second = lines(tmp_path)
    assert (first["reward"], second["reward"]) == (0.5, 3.0)
    assert (first["step"], first["loss"], first["grad_norm"]) == (2, 2.25, 2.0)
    assert (second["step"], second["loss"], second["grad_norm"]) == (3, 5.0, 7.0)
    assert (first["learning_rate"], second["learning_rate"]) == (2.0, 3.0)


def test_padding_is_not_seen(tmp_path):
    """Not that of skipped steps either, nor of those before a run was resumed."""

    def padded(total, is_skipped=0.0):
        return metrics(2.0) | {
            "padding": Average(jnp.int32(total), 1000),
            "skipped": jnp.float32(is_skipped),
        }

    with MetricsWriter(RunStart(tmp_path)) as writer:
        recorder = new_recorder(writer)
        recorder.submit(1, padded(100))
        resumed = new_recorder(writer, recorder.state())
        resumed.submit(2, padded(400))
        resumed.submit(3, padded(50, is_skipped=1.0))
        resumed.submit(4, padded(200))
        resumed.flush()
    found = [(line["tokens_seen"], line["padding"]) for line in lines(tmp_path)]
    assert found == [(1500, 0.25), (3250, 0.2)]


def test_padding_is_no_token_of_the_speed(clock, tmp_path):
    """A quarter of 1000 positions, all of which the devices compute, in 2 s."""
    with MetricsWriter(RunStart(tmp_path)) as writer:
        recorder = new_recorder(writer)
        for step, padding in ((1, 100), (2, 400)):
            clock.now += 2
            recorder.submit(step, metrics(2.0) | {"padding": Average(jnp.int32(padding), 1000)})
        recorder.flush()
    (line,) = lines(tmp_path)
    assert line["tokens_per_second"] == 375.0 == line["tokens_seen"] / 4
    assert line["tokens_per_second_per_device"] == 93.8
    assert line["mfu"] == round(6e9 / 2 / 4e12, 4)


def test_an_unknown_learning_rate_is_left_out(recorder, tmp_path):
    values = metrics(2.0)
    del values["learning_rate"]
    recorder.submit(2, values)
    recorder.flush()
    assert "learning_rate" not in lines(tmp_path)[0]


def test_speed_is_that_of_the_steps_whatever_comes_between(clock, tmp_path):
    """Each step takes 2 s, and is done before Python continues; 1000 tokens."""
    with MetricsWriter(RunStart(tmp_path)) as writer:
        recorder = new_recorder(writer)
        for step in range(1, 7):
            recorder.collect()
            clock.now += 2
            recorder.submit(step, metrics(2.0))
            if step in (3, 4, 6):
                with recorder.paused():
                    clock.now += 500
                recorder.flush({"validation_bits_per_byte": 1.0})
    assert [(line["step"], line["tokens_per_second"]) for line in lines(tmp_path)] == [
        *((2, 500.0), (3, 500.0), (4, 500.0), (6, 500.0))
    ]


def test_speed_is_that_of_the_steps_where_devices_compute_behind_python(clock, tmp_path):
    """Each step takes 2 s, and reading its loss waits for it."""
    with MetricsWriter(RunStart(tmp_path)) as writer:
        recorder = new_recorder(writer)
        free = clock.now
        for step in range(1, 7):
            recorder.collect()
            free = max(free, clock.now) + 2
            loss = Average(Unfinished(clock, free), 1000)
            recorder.submit(step, metrics(2.0) | {"loss": loss})
            if step in (3, 4, 6):
                with recorder.paused():
                    clock.now += 500
                recorder.flush({"validation_bits_per_byte": 1.0})
    assert [(line["step"], line["tokens_per_second"]) for line in lines(tmp_path)] == [
        *((2, 500.0), (3, 500.0), (4, 500.0), (6, 500.0))
    ]


def test_devices_stall_where_they_have_nothing_to_do(clock, recorder, tmp_path):
    with recorder.waiting_for("checkpoint"):  # before the first step
        clock.now += 3
    busy = Unfinished(clock, done=clock.now + 2)
    recorder.submit(2, metrics(2.0) | {"loss": Average(busy, 1000)})
    with recorder.waiting_for("input"):
        clock.now += 1
    with recorder.waiting_for("input"):
        clock.now += 4
    recorder.flush()
    (values,) = lines(tmp_path)
    assert values["checkpoint_seconds"] == 3
    assert values["input_seconds"] == 4  # the most that it can be: the devices were busy for 1


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"loss": math.nan}, "the loss is nan and its gradient's norm 1.0"),
        ({"loss": math.inf}, "the loss is inf and its gradient's norm 1.0"),
        ({"loss": 2.0, "grad_norm": math.nan}, "the loss is 2.0 and its gradient's norm nan"),
        ({"loss": 0.0, "tokens": 0}, "the loss is nan and its gradient's norm 1.0"),
    ],
)
def test_a_run_that_diverged_stops_with_the_step_and_what_to_look_at(
    recorder, tmp_path, values, said
):
    recorder.submit(2, metrics(**values))
    with pytest.raises(HymbaError) as caught:
        recorder.flush()
    assert str(caught.value).startswith(f"step 2: {said}, at learning rate 0.002: data 2: check")
    assert steps(tmp_path) == []


def record(directory, steps, state, clock):
    """Records steps of 2 s from a state on; the state after them, as a checkpoint has it."""
    with MetricsWriter(RunStart(directory, state.logged)) as writer:
        recorder = new_recorder(writer, state)
        for step in steps:
            with recorder.waiting_for("input"):
                clock.now += 2
            values = metrics(1 / step, grad_norm=step / 3, tokens=10 * step, learning_rate=step)
            recorder.submit(step, values | {"skipped": jnp.float32(step == 3)})
            recorder.collect()
        return RecorderState(**json.loads(json.dumps(dataclasses.asdict(recorder.state()))))


def test_a_resumed_recorder_writes_the_lines_of_one_that_never_stopped(clock, tmp_path):
    record(tmp_path, range(1, STEPS + 1), RecorderState(), clock)
    expected = lines(tmp_path)
    assert [(line["step"], line["input_seconds"]) for line in expected] == [(2, 4), (4, 4), (6, 4)]
    for stop in range(1, STEPS):
        directory = tmp_path / str(stop)
        directory.mkdir()
        state = record(directory, range(1, stop + 1), RecorderState(), clock)
        clock.now += 1000
        record(directory, range(stop + 1, STEPS + 1), state, clock)
        assert lines(directory) == expected


def test_a_line_waits_for_the_validation_that_a_resumed_run_does(clock, tmp_path):
    """Which the state of the step does not write."""
    with MetricsWriter(RunStart(tmp_path)) as writer:
        recorder = new_recorder(writer)
        clock.now += 2
        recorder.submit(2, metrics(3.0))
        state = recorder.state()
        assert lines(tmp_path) == []
        clock.now += 1000
        new_recorder(writer, state).flush({"validation_bits_per_byte": 1.0})
    (values,) = lines(tmp_path)
    assert (values["step"], values["loss"], values["tokens_per_second"]) == (2, 3.0, 1000.0)


def test_skipped_steps_are_counted_printed_and_left_out_of_averages(recorder, tmp_path, capsys):
    for step, loss in enumerate((3.0, math.nan, math.inf, 1.0), start=1):
        skipped = {"skipped": jnp.float32(not math.isfinite(loss))}
        recorder.submit(step, metrics(loss, learning_rate=step) | skipped)
    recorder.flush()
    assert [(line["loss"], line["skipped_steps"]) for line in lines(tmp_path)] == [(3, 1), (1, 2)]
    said = capsys.readouterr().out
    assert "step 2: the loss is nan and its gradient's norm 1.0: data 2: update skipped\n" in said
    assert "step 3: the loss is inf and its gradient's norm 1.0: data 3: update skipped\n" in said


def test_a_run_that_skips_every_step_stops(recorder):
    bad = metrics(math.nan) | {"skipped": jnp.float32(1)}
    for step in range(1, 11):
        recorder.submit(step, bad)
    with pytest.raises(HymbaError, match=r"step 10: .*data 10: updates were skipped 10 times"):
        recorder.flush()


def test_a_loss_spike_is_printed_with_its_data(recorder, capsys):
    for step in range(1, 51):
        recorder.submit(step, metrics(4.5 if step == 40 else 3.0 + step % 5 / 10))
    recorder.flush()
    spikes = [line for line in capsys.readouterr().out.splitlines() if "spike" in line]
    assert spikes == ["step 40: loss spike, 4.5000 after a median of 3.2000: data 40"]


def test_progress_is_one_line_that_fits_a_terminal(clock, tmp_path, capsys):
    """At 2 s a step, of which 0.5 s are a stall."""
    workload = Workload(tokens=2**21, flops=3e15, devices=4, peak_flops=4e15)
    state = RecorderState(8, 8, bits_per_byte=0.8125)
    with MetricsWriter(RunStart(tmp_path)) as writer:
        recorder = Recorder(10_000, 1, writer, Display(), state)
        recorder.begin_stage(StageRecords("decay", 8, 0, workload, lambda step: {}, str))
        with recorder.waiting_for("input"):
            clock.now += 0.5
        clock.now += 1.5
        recorder.submit(9, metrics(2.5))
        recorder.flush()
    (line,) = capsys.readouterr().out.splitlines()
    assert line == (
        "decay  step     9/10000   0%  loss 2.5000  val 0.8125 bpb  1,048,576 tok/s  38% MFU  "
        "5:33:02 left  25% input stalls"
    )
    assert line.index(" left") < 100


def test_lines_name_the_process_that_works_longest(clock, tmp_path, monkeypatch, capsys):
    """1 s of a step's 2 s, though most of the time goes by in a validation."""

    class Slowest:
        submitted = None

        def submit(self, seconds):
            self.submitted = seconds

        def read(self):
            seconds, self.submitted = self.submitted, None
            return seconds and (3, seconds)

    monkeypatch.setattr("hymba_jax.training.recorder.SlowestProcess", Slowest)
    with MetricsWriter(RunStart(tmp_path)) as writer:
        recorder, free = new_recorder(writer), clock.now
        for step in range(1, 7):
            clock.now += 1
            free = max(free, clock.now) + 2
            loss = Average(Unfinished(clock, free), 1000)
            recorder.submit(step, metrics(2.0) | {"loss": loss})
            if step == 3:
                with recorder.paused():
                    clock.now += 500
                recorder.flush({"validation_bits_per_byte": 1.0})
        recorder.flush()
    named = [(line["step"], line.get("slowest_process_seconds")) for line in lines(tmp_path)]
    assert named == [(2, 1.0), (3, None), (4, 1.0), (6, 1.0)]
    assert [line.get("slowest_process") for line in lines(tmp_path)] == [3, None, 3, 3]
    assert "  slowest process 3 1.00 s\n" in capsys.readouterr().out


def test_durations_are_hours_minutes_seconds():
    assert [duration(s) for s in (0.4, 61.0, 108000.0)] == ["0:00:00", "0:01:01", "1 day, 6:00:00"]
