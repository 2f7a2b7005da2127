"""Runs in emulated buckets, by the real commands: killed, resumed, and read by others."""

import signal
import subprocess
import sys

import pytest
from entry.command import REPOSITORY, environment, read_metrics, run, write_config

from hymba_jax import load
from hymba_jax.data import tokenize_command
from hymba_jax.data.tokenize_command import TokenizeConfig, TokenizeDataConfig
from hymba_jax.remote import RemotePath
from hymba_jax.run_files import checkpoint_steps
from hymba_jax.training.arguments import parse_run

STEPS = "8"
# The lock of a process that was killed expires sooner than for people.
TRAIN = """
import hymba_jax.remote_lock as lock
from hymba_jax.cli import train
lock.RENEWAL, lock.EXPIRY = 0.2, 1
train()
"""


def command(config, output, tokens):
    options = ("--config", config, "--output", output, "--data.path", tokens)
    options += ("--training.steps", STEPS, "--training.sample-tokens", "0")
    return [sys.executable, "-c", TRAIN, *map(str, options)]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    directory = tmp_path_factory.mktemp("remote")
    config = write_config(directory, directory / "unused")
    data = TokenizeDataConfig(str(directory / "corpus"), validation_fraction=0.25)
    options = TokenizeConfig(str(directory / "tokens"), data, tokenizer="bytes", workers=1)
    tokenize_command.main(options)
    return config


@pytest.fixture(scope="module")
def uninterrupted(config, cache):
    """The directory of the same run on the disk, and what its model generates."""
    output = config.parent / "uninterrupted"
    assert run(command(config, output, config.parent / "tokens"), cache).returncode == 0
    return output, generate(output)


def generate(directory):
    return load(directory).generate("the", max_new_tokens=4)


def kill_at(command, cache, line):
    """Kills a command once it prints such a line."""
    with subprocess.Popen(
        command, env=environment(cache), cwd=REPOSITORY, stdout=subprocess.PIPE, text=True
    ) as process:
        assert any(printed.startswith(line) for printed in process.stdout)
        process.send_signal(signal.SIGKILL)


@pytest.mark.slow
def test_a_killed_run_resumes_and_others_start_from_it(
    bucket_url, uninterrupted, config, tmp_path, cache, monkeypatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    output, tokens = f"{bucket_url}/run", f"{bucket_url}/tokens"
    RemotePath(tokens).upload(config.parent / "tokens")
    train = command(config, output, tokens)
    kill_at(train, cache, "step 5/")  # 2 is complete, 4 is being written
    assert checkpoint_steps(output) in ([2], [2, 4])
    resumed = run(train, cache)
    assert resumed.returncode == 0, resumed.stderr
    assert "waiting up to 1 s to see whether the run there has died" in resumed.stdout
    assert "resuming after step" in resumed.stdout

    RemotePath(output).download(tmp_path / "copy")
    directory, generated = uninterrupted
    assert read_metrics(tmp_path / "copy") == read_metrics(directory)
    assert not (tmp_path / "copy" / "run.lock").exists()

    assert generate(output) == generated
    initialized = parse_run(["--init-from", output], "train")[0]
    assert initialized.model.hidden_size == 16
    assert initialized.data.tokenizer == output
