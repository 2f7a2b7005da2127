"""What all commands share: names, help, and how they end when their output cannot be written."""

import io
import os
import signal
import subprocess
import sys
import tomllib
from contextlib import closing

import pytest
from entry.command import HYMBA, REPOSITORY, environment

import hymba_jax
from hymba_jax import cli

VERSION = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["version"]
COMMANDS = [
    *("tokenize", "train", "generate", "chat", "serve", "batch", "bench-serve", "evaluate"),
    *("report", "warmup", "memory", "designs"),
    *("schedule", "compile", "export", "convert", "inspect"),
]
MEMORY = ["memory", "--preset", "hymba-125m"]


def test_the_version(capsys):
    cli.main(["--version"])
    assert capsys.readouterr().out == f"hymba {VERSION}\n"
    assert hymba_jax.__version__ == VERSION


def test_names_of_the_package():
    assert {"load", "__version__"} <= set(dir(hymba_jax))
    assert not hasattr(hymba_jax, "nothing")


@pytest.mark.parametrize("arguments", [[], ["-h"], ["--help"]])
def test_help_names_every_command(arguments, capsys):
    cli.main(arguments)
    printed = capsys.readouterr().out
    assert [line.split()[0] for line in printed.splitlines()[5:][: len(COMMANDS)]] == COMMANDS


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("generat", "did you mean generate?"),
        ("Train", "did you mean train?"),
        ("\n", f"there are {', '.join(COMMANDS)}"),
        ("--verison", f"there are {', '.join(COMMANDS)}"),
    ],
)
def test_unknown_commands(name, hint):
    with pytest.raises(SystemExit) as stopped:
        cli.main([name])
    assert stopped.value.code == "error: hymba has no command " + f"{name!r}, {hint}"


@pytest.fixture
def output_to(monkeypatch):
    """Makes standard output a file that is opened so."""

    def output_to(file, **options):
        stream = open(file, "w", **options)  # noqa: SIM115
        monkeypatch.setattr(sys, "stdout", stream)
        return closing(stream)

    return output_to


@pytest.mark.parametrize("arguments", [["--help"], MEMORY, ["memory", "--help"]])
def test_a_reader_that_has_gone(output_to, arguments, capsys):
    reader, writer = os.pipe()
    os.close(reader)
    with output_to(writer), pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 128 + 13  # as of a program that SIGPIPE ended
    assert capsys.readouterr().err == ""


def test_a_reader_that_has_gone_in_a_process_of_its_own(cache):
    reader, writer = os.pipe()
    os.close(reader)
    result = subprocess.run(
        [HYMBA, "--help"],
        stdout=writer,
        stderr=subprocess.PIPE,
        env=environment(cache),
        timeout=300,
        check=False,
    )
    os.close(writer)
    assert (result.returncode, result.stderr) == (141, b"")


def test_an_output_that_is_full(output_to):
    with output_to("/dev/full"), pytest.raises(SystemExit) as stopped:
        cli.main(["--help"])
    assert stopped.value.code == "error: No space left on device"


def test_a_standard_error_that_was_a_file(tmp_path, monkeypatch, capsys):
    """It becomes a pipe where several processes run, see watchdog.py."""
    reading, writing = os.pipe()
    with (tmp_path / "log").open("w") as stderr:
        os.dup2(writing, stderr.fileno())
        monkeypatch.setattr(sys, "stderr", stderr)
        cli.main(["--version"])
    os.close(reading)
    os.close(writing)
    assert capsys.readouterr().out == f"hymba {VERSION}\n"


@pytest.mark.parametrize(
    ("encoding", "expected"), [("ascii", r"\xe9\u20ac"), ("latin-1", r"é\u20ac"), ("utf-8", "é€")]
)
def test_what_the_output_cannot_encode_is_escaped(monkeypatch, encoding, expected):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding=encoding))
    monkeypatch.setattr(cli, "HELP", "é€")
    cli.main([])
    assert written.getvalue().decode(encoding) == f"{expected}\n"


def test_an_interrupt_before_training_that_a_callback_would_swallow(cache):
    """While JAX is imported, say: it ends the process whatever becomes of KeyboardInterrupt."""
    script = """
import signal, sys, types
from hymba_jax import cli
def parse_run(args, prog):
    try:
        signal.raise_signal(signal.SIGINT)
    except KeyboardInterrupt:
        print("swallowed")
    sys.exit(3)
sys.modules["hymba_jax.training.arguments"] = types.SimpleNamespace(
    names_model=None, parse_run=parse_run
)
cli.train([])
"""
    result = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        env=environment(cache),
        cwd=REPOSITORY,
        timeout=300,
        check=False,
    )
    assert (result.returncode, result.stdout) == (-signal.SIGINT, b"")
