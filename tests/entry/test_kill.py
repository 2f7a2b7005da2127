"""A run that is killed and started again, however often, equals one that never stopped."""

import random
import signal
import subprocess

import pytest
from entry.command import environment, read_metrics, run, train_py


def command(config, output, steps):
    return train_py(
        *("--config", config, "--output", output, "--training.steps", str(steps)),
        *("--training.keep-checkpoints", "1", "--training.sample-tokens", "0"),
    )


def run_and_kill(config, output, steps, cache, rng):
    """Starts the run, kills it at a random moment, and gives its exit status."""
    process = subprocess.Popen(
        [str(part) for part in command(config, output, steps)],
        env=environment(cache),
        stdout=subprocess.PIPE,
        text=True,
    )
    lines = rng.randrange(2, 16)  # two lines come before the first step
    for _ in zip(range(lines), process.stdout, strict=False):
        pass
    try:
        process.wait(rng.uniform(0, 0.05))
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
    process.communicate()
    return process.returncode


def kill_until_done(config, output, steps, cache, seed, at_least):
    rng, kills = random.Random(seed), 0
    while (status := run_and_kill(config, output, steps, cache, rng)) != 0:
        assert status == -signal.SIGKILL
        kills += 1
        if kills == at_least:  # enough: let it finish
            assert run(command(config, output, steps), cache).returncode == 0
            break
    assert kills > 0


@pytest.mark.parametrize(
    ("seed", "kills", "steps"), [(0, 2, 16), pytest.param(1, 30, 40, marks=pytest.mark.slow)]
)
def test_a_killed_run_equals_one_that_never_stopped(config, tmp_path, cache, seed, kills, steps):
    uninterrupted, killed = tmp_path / "uninterrupted", tmp_path / "killed"
    assert run(command(config, uninterrupted, steps), cache).returncode == 0
    kill_until_done(config, killed, steps, cache, seed, kills)
    assert read_metrics(killed) == read_metrics(uninterrupted)
    assert len(read_metrics(uninterrupted)) == steps
    assert [path.name for path in (killed / "checkpoints").iterdir()] == [str(steps)]
