"""`hymba tokenize`: killed at random moments, and told what is wrong."""

import contextlib
import random
import shutil
import signal
import subprocess
import sys
import time

import jax
import pytest
from entry.command import environment, read_metrics, write_config

from hymba_jax import cli
from hymba_jax.data import tokenize_records
from hymba_jax.parallel.mesh import make_mesh
from hymba_jax.training import loop

# The command with units of few files, so that a small corpus has many.
SMALL_UNITS = """
from hymba_jax import cli
from hymba_jax.data import tokenize_records
tokenize_records.UNIT_BYTES = 30_000
cli.main()
"""


@pytest.fixture
def corpus(tmp_path):
    directory = tmp_path / "corpus"
    directory.mkdir()
    for number in range(40):
        words = random.Random(number).choices(["the ", "old ", "dog\n", "sat. ", "é "], k=4_000)
        (directory / f"{number:02}.txt").write_text("".join(words))
    return directory


def arguments(corpus, output, *more):
    return ["tokenize", "--data.path", str(corpus), "--output", str(output), *more]


def contents(directory):
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file() and path.suffix != ".lock"
    }


def descendants(process):
    """The processes that another one has started, and those that these have."""
    listed = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True)
    parents = [tuple(map(int, line.split())) for line in listed.stdout.splitlines()]
    found = {process}
    while more := {pid for pid, parent in parents if parent in found} - found:
        found |= more
    return found - {process}


def alive(processes):
    listed = subprocess.run(["ps", "-eo", "pid=,stat="], capture_output=True, text=True, check=True)
    states = dict(line.split() for line in listed.stdout.splitlines())
    return {pid for pid in processes if states.get(str(pid), "Z")[0] != "Z"}


@pytest.mark.parametrize("kills", [1, pytest.param(8, marks=pytest.mark.slow)])
def test_killed_it_continues_to_the_same_bytes(corpus, tmp_path, cache, monkeypatch, kills):
    output, rng = tmp_path / "killed", random.Random(0)
    command = [
        sys.executable,
        "-c",
        SMALL_UNITS,
        *arguments(corpus, output, "--tokenizer", "bytes"),
    ]
    for _ in range(kills):
        records = len([*output.glob("units/0*.json")]) + rng.randrange(1, 4)
        process = subprocess.Popen(
            [*command, "--workers", "2"], env=environment(cache), stdout=subprocess.DEVNULL
        )
        while len([*output.glob("units/0*.json")]) < records:
            time.sleep(0.01)
            assert process.poll() is None
        workers = descendants(process.pid)
        assert len(workers) > 1
        time.sleep(rng.uniform(0, 0.05))
        process.send_signal(signal.SIGKILL)
        process.wait()
        for _ in range(100):
            if not alive(workers):
                break
            time.sleep(0.05)
        assert not alive(workers)
    assert not (output / "manifest.json").exists()
    finished = subprocess.run(command, env=environment(cache), capture_output=True, check=False)
    assert (finished.returncode, finished.stderr) == (0, b"")

    monkeypatch.setattr(tokenize_records, "UNIT_BYTES", 30_000)
    whole = tmp_path / "whole"
    cli.main(arguments(corpus, whole, "--tokenizer", "bytes", "--workers", "1"))
    assert contents(output) == contents(whole)
    assert len(contents(whole)) > 100


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_is_one_line(corpus, tmp_path, cache, name):
    output, number = tmp_path / "stopped", signal.Signals[name]
    command = arguments(corpus, output, "--tokenizer", "bytes", "--workers", "2")
    process = subprocess.Popen(
        [sys.executable, "-c", SMALL_UNITS, *command],
        env=environment(cache),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not [*output.glob("units/0*.json")]:
        time.sleep(0.01)
        assert process.poll() is None
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    what = {"SIGTERM": "SIGTERM", "SIGINT": "Ctrl-C"}[name]
    assert error == f"stopped by {what}: run the same command again to continue in {output}\n"
    assert process.returncode == 128 + number
    assert not [*output.glob("*.lock")]


def test_a_corpus_from_the_command_line(corpus, tmp_path, capsys):
    options = ("--tokenizer", "bpe:270", "--data.validation-fraction", "0.5")
    cli.main(arguments(corpus, tmp_path / "out", *options))
    first, *_, train, validation = capsys.readouterr().out.splitlines()
    assert first == "listing the files…"
    counts = [int(line.split()[1]) for line in (train, validation)]
    assert sum(counts) == 40
    assert min(counts) > 5
    cli.main(["tokenize", "--check", "--output", str(tmp_path / "out")])
    assert capsys.readouterr().out.endswith("out: no damage\n")

    path = tmp_path / "out" / "train-00000-000.bin"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(SystemExit) as stopped:
        cli.main(["tokenize", "--check", "--output", str(tmp_path / "out")])
    assert stopped.value.code == f"error: {tmp_path / 'out'}: damaged in 1 places"
    assert f"{path}: damaged in block " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "tokenizer is missing: give bytes"),
        (("--tokenizer", "bpe:many"), "tokenizer 'bpe:many' needs an integer"),
        (("--tokenizer", "nowhere"), "unknown tokenizer 'nowhere': give bytes, bpe:SIZE"),
        (("--tokenizer", "bytes", "--data.exclude", "/nowhere"), "/nowhere: no such file or dir"),
    ],
)
def test_what_is_wrong_is_one_line(corpus, tmp_path, options, message):
    with pytest.raises(SystemExit) as stopped, contextlib.chdir(tmp_path):
        cli.main(arguments(corpus, tmp_path / "out", *options))
    assert message in stopped.value.code
    assert "\n" not in stopped.value.code


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/nowhere", "/nowhere: no such file or dir"),
        ("empty.jsonl", "has no documents, all of its text"),
    ],
)
def test_a_path_without_text_is_one_line(tmp_path, path, message):
    (tmp_path / "empty.jsonl").write_text("\n\n")
    test_what_is_wrong_is_one_line(path, tmp_path, ("--tokenizer", "bytes"), message)


def test_train_reads_what_it_wrote(corpus, tmp_path, monkeypatch, capsys):
    """Whole documents packed into rows, and a run does not resume on other tokens."""
    tokens, output = tmp_path / "tokens", tmp_path / "run"
    options = ("--tokenizer", "bytes", "--data.validation-fraction", "0.2")
    cli.main(arguments(corpus, tokens, *options))
    (tmp_path / "other").mkdir()
    config = write_config(tmp_path / "other", output)
    packed = ("--data.path", tokens, "--data.packing", "documents")
    short = ("--training.steps", "2", "--training.sample-tokens", "0")
    mesh = make_mesh(jax.devices()[:1])
    monkeypatch.setattr(loop, "make_mesh", lambda parallel: mesh)
    cli.train([str(argument) for argument in ("--config", config, *packed, *short)])
    said = f"{tokens}: is tokenized: its tokenizer and validation documents are used"
    assert said in capsys.readouterr().out
    assert [line["step"] for line in read_metrics(output)] == [1, 2]
    shutil.rmtree(tokens)
    (corpus / "00.txt").write_text("another text")
    cli.main(arguments(corpus, tokens, *options))
    monkeypatch.setattr(loop, "compile_stage", pytest.fail)
    longer = ("--config", config, *packed, "--training.steps", "3")
    with pytest.raises(SystemExit) as stopped:
        cli.train([str(argument) for argument in longer])
    assert stopped.value.code.startswith(
        f"error: {output}: the training source corpus has other tokens than those"
    )
