"""Runs of several processes: the same losses as one, and no process left behind."""

import json
import signal
import time

import pytest
from entry.command import run, train_py, write_config
from entry.processes import addresses, ends, free_port, slurm, start
from slow import slow_but

from hymba_jax.run_files import checkpoint_steps

STEPS = 50
ALONE = [([], {})]
ROUNDING = {"rel": 1e-4}  # float32 sums, in another order on every number of devices


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    directory = tmp_path_factory.mktemp("processes")
    return write_config(directory, directory / "uninterrupted")


def options(config, output, steps=STEPS, *more):
    """Of a run whose losses do not depend on when it shall end."""
    schedule = ["--training.warmup-fraction", "0", "--training.decay-fraction", "0"]
    rare = ["--training.validate-every", "35"]
    if "--training.sample-tokens" not in more:
        rare += ["--training.sample-tokens", "0"]
    every = ["--training.checkpoint-every", "10", "--training.steps", str(steps)]
    return ["--config", str(config), "--output", str(output), *schedule, *rare, *every, *more]


@pytest.fixture(scope="module")
def uninterrupted(config, cache):
    """The metrics of a run on one device that never stopped."""
    output = config.parent / "uninterrupted"
    result = run(train_py(*options(config, output)), cache)
    assert result.returncode == 0, result.stderr
    return read(output)


def read(output):
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def assert_same(lines, uninterrupted):
    """Losses, gradients and what both runs validated."""
    for actual, expected in zip(lines, uninterrupted, strict=False):
        for name in ("step", "loss", "grad_norm"):
            assert actual[name] == pytest.approx(expected[name], **ROUNDING)
        if actual["step"] == 35:  # no part of it ends there, where all held-out text is read
            assert actual["validation_loss"] == pytest.approx(
                expected["validation_loss"], **ROUNDING
            )


def train_to(config, output, cache, steps, devices, processes, *more, program="train.py"):
    """Trains up to a step; `processes` has the options and the environment of each."""
    arguments = options(config, output, steps, *more)
    started = [
        start([*arguments, *where], devices, cache, variables, program)
        for where, variables in processes
    ]
    ended = ends(started)
    assert [process.status for process in ended] == [0] * len(ended), ended
    assert [process.stderr for process in ended] == [""] * len(ended)
    assert [line["step"] for line in read(output)] == [*range(1, steps + 1)]
    return [process.stdout for process in ended]


@pytest.mark.slow
def test_a_run_resumes_on_four_processes_and_fewer(config, uninterrupted, cache, tmp_path):
    train_to(config, tmp_path, cache, 10, 1, ALONE)
    # Rows are split in 2, so that two processes hold the same ones.
    split, counted = ("--parallel.tensor", "4"), "tests/entry/count_rows.py"
    no_warnings = {"TF_CPP_MIN_LOG_LEVEL": "2"}  # XLA's, of how it splits so small a model
    where = [(options, no_warnings) for options, _ in addresses(4)]
    said = train_to(config, tmp_path, cache, 20, 2, where, *split, program=counted)
    assert "fsdp 2 x sequence 1 x tensor 4; sharded: batch over 2" in said[0]
    assert [text.splitlines()[-1] for text in said] == ["rows read: 40"] * 4
    train_to(config, tmp_path, cache, 30, 1, addresses(4))
    train_to(config, tmp_path, cache, 40, 4, addresses(2), "--parallel.data", "2")
    train_to(config, tmp_path, cache, 50, 4, ALONE)
    assert_same(read(tmp_path), uninterrupted)


def interrupt(config, output, cache, devices, processes, victim, number, *more):
    """Sends a signal to one process at step 25: how all ended, and after how many seconds."""
    arguments = options(config, output, STEPS, *more)
    started = [start([*arguments, *where], devices, cache) for where, _ in processes]
    for line in started[0].stdout:
        if line.startswith("step 25/"):
            break
    started[victim].send_signal(number)
    began = time.monotonic()
    ended = ends(started, 60)
    return ended, time.monotonic() - began


def assert_lost(ended, victim, output):
    """All others say so, and from which step to resume: that of the newest checkpoint, which may
    not have been complete at the signal."""
    newest = checkpoint_steps(output)[-1]
    for i, process in enumerate(ended):
        if i != victim:
            assert process.status not in (0, -signal.SIGKILL)
            (line,) = process.stderr.splitlines()
            assert line.startswith(f"error: {output}: lost process {victim}, which stopped, was ")
            assert line.endswith(f"with the same command to resume from step {newest}")


def test_a_run_of_which_a_process_is_killed_resumes(config, uninterrupted, cache, tmp_path):
    """In two processes of SLURM's. In fewer, on fewer devices, the run that a signal stops resumes
    below."""
    short = ("--distributed.heartbeat-timeout", "10")
    ended, _ = interrupt(config, tmp_path, cache, 1, addresses(2), 1, signal.SIGKILL, *short)
    assert ended[1].status == -signal.SIGKILL
    assert_lost(ended, 1, tmp_path)
    sample, counted = ("--training.sample-tokens", "4"), "tests/entry/count_rows.py"
    newest = checkpoint_steps(tmp_path)[-1]
    said = train_to(config, tmp_path, cache, 40, 1, slurm(2), *sample, program=counted)
    assert "2 x cpu in 2 processes" in said[0]
    assert f"resuming after step {newest}" in said[0]
    counted = f"rows read: {(40 - newest) * 4}"  # half of each step's 8
    assert said[0].splitlines()[-1] == counted
    assert said[1] == f"{counted}\n"
    assert (tmp_path / "sample.txt").read_text().startswith("the")
    lines = read(tmp_path)
    assert_same(lines, uninterrupted)
    assert {line.get("slowest_process") for line in lines} <= {0, 1}
    assert "distributed" not in (tmp_path / "config.toml").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 2])
def test_a_process_that_ends_takes_three_with_it(
    config, uninterrupted, cache, tmp_path, victim, capsys
):
    """In less than a minute, with the defaults."""
    killed = signal.SIGKILL
    ended, seconds = interrupt(config, tmp_path, cache, 1, addresses(4), victim, killed)
    assert ended[victim].status == -killed
    assert_lost(ended, victim, tmp_path)
    with capsys.disabled():
        print(f"\nprocess {victim} was killed: all ended {seconds:.1f} s later")
    train_to(config, tmp_path, cache, STEPS, 1, addresses(4))
    assert_same(read(tmp_path), uninterrupted)


@pytest.mark.parametrize(
    ("victim", "number", "name"),
    slow_but(
        [(1, signal.SIGTERM, "SIGTERM"), (0, signal.SIGINT, "Ctrl-C")],
        (1, signal.SIGTERM, "SIGTERM"),
    ),
)
def test_a_signal_to_one_process_stops_all_after_the_same_step(
    config, uninterrupted, cache, tmp_path, victim, number, name
):
    ended, seconds = interrupt(config, tmp_path, cache, 1, addresses(2), victim, number)
    step = checkpoint_steps(tmp_path)[-1]
    assert 25 < step < STEPS
    said = f"\nstopped by {name}: the same command resumes {tmp_path} from step {step}\n"
    assert [(process.status, process.stderr) for process in ended] == [(128 + number, said)] * 2
    assert seconds < 30
    (said,) = train_to(config, tmp_path, cache, STEPS, 1, ALONE)
    assert f"resuming after step {step}" in said
    lines = read(tmp_path)
    assert_same(lines, uninterrupted)
    slowest = [line.get("slowest_process") for line in lines]
    assert {*slowest[:step]} <= {0, 1}  # of two processes, and not of one
    assert {*slowest[step:]} == {None}


def test_an_error_in_one_process_ends_the_other(config, cache, tmp_path):
    arguments = options(config, tmp_path / "run", STEPS, "--distributed.heartbeat-timeout", "5")
    (first, _), (second, _) = addresses(2)
    bad = ["--data.path", str(tmp_path / "gone")]
    ended = ends(  # the first reads the text for all, while the others wait
        [start([*arguments, *first, *bad], 1, cache), start([*arguments, *second], 1, cache)]
    )
    assert ended[0].status == 1
    assert ended[0].stderr.startswith(f"error: {tmp_path}/gone: no such file")
    assert ended[1].status != 0
    assert "lost process 0" in ended[1].stderr
    assert ended[1].stderr.endswith("to start from scratch\n")


@pytest.mark.slow
def test_an_output_that_is_not_shared_is_refused(config, cache, tmp_path):
    short = ("--distributed.heartbeat-timeout", "5")
    ended = ends(
        [
            start([*options(config, tmp_path / f"own{i}" / "run", STEPS, *short), *where], 1, cache)
            for i, (where, _) in enumerate(addresses(2))
        ]
    )
    assert all(process.status != 0 for process in ended)
    assert ended[1].stderr.startswith(f"error: {tmp_path}/own1/run")
    assert len(ended[1].stderr.splitlines()) == 1


def refused(config, cache, output, *more):
    """What two processes say that end before they compile, the second with options of its own."""
    arguments = options(config, output, STEPS, "--distributed.heartbeat-timeout", "5")
    (first, _), (second, _) = addresses(2)
    ended = ends(
        [start([*arguments, *first], 1, cache), start([*arguments, *second, *more], 1, cache)]
    )
    assert all(process.status != 0 for process in ended)
    assert not output.exists()
    return ended


def test_another_config_in_one_process_is_refused(config, cache, tmp_path):
    rates = ("--training.learning-rate", "1.0", "--seed", "3")
    for process in refused(config, cache, tmp_path / "run", *rates):
        assert process.status == 1
        assert process.stderr == (
            "error: the processes of the run differ: seed is 0 in process 0 and 3 in process "
            "1; training.learning_rate is 0.003 in process 0 and 1.0 in process 1: start all with "
            "the same command, packages and data\n"
        )


@pytest.mark.slow
def test_other_text_in_one_process_is_refused(config, cache, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    for i in range(12):
        (other / f"page{i}.txt").write_text("another text. " * 40)
    for process in refused(config, cache, tmp_path / "run", "--data.path", str(other)):
        assert "the digest of data.path's training tokens is " in process.stderr
        assert "the digest of its validation tokens is " in process.stderr
        assert "tokenizer" not in process.stderr


def test_nobody_at_the_address(config, cache, tmp_path):
    address = f"127.0.0.1:{free_port()}"
    where = ["--distributed.coordinator", address, "--distributed.num-processes", "2"]
    where += ["--distributed.process-id", "1", "--distributed.start-timeout", "3"]
    (ended,) = ends([start([*options(config, tmp_path / "run"), *where], 1, cache)], 120)
    assert ended.status != 0
    assert ended.stdout == ""
    (line,) = ended.stderr.splitlines()
    assert line.startswith(
        f"error: not all processes of the run connected at {address} within 3 s: "
    )
    assert not (tmp_path / "run").exists()
