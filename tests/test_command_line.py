"""Options that are given twice, of which argparse and tyro use the last one alone."""

from dataclasses import dataclass
from pathlib import Path

import pytest

import hymba_jax
from hymba_jax import cli
from hymba_jax.command_line import parse_command_line
from hymba_jax.errors import HymbaError


@dataclass(frozen=True)
class Part:
    """A part.

    Attributes:
      flag: on or off.
    """

    flag: bool = False


@dataclass(frozen=True)
class Options:
    """Options.

    Attributes:
      stop_at: several.
      steps: a number.
      part: more.
    """

    stop_at: tuple[str, ...] = ()
    steps: int = 0
    part: Part = Part()


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (["--stop-at", "a", "--stop-at", "b"], "--stop-at"),
        (["--stop-at", "a", "--stop_at=b"], "--stop-at"),
        (["--steps", "5", "--stop-at", "a", "--steps=6"], "--steps"),
        (["--part.flag", "--part.no-flag"], "--part.flag"),
    ],
)
def test_options_given_twice_are_refused(arguments, name):
    with pytest.raises(HymbaError, match=f"^{name} is given twice: .*, {name} FIRST SECOND$"):
        parse_command_line(Options, arguments, "x")


def test_several_paths_of_data_are_refused():
    for command in ("tokenize", "train", "evaluate"):
        with pytest.raises(SystemExit) as stopped:
            cli.main([command, "--data.path", "a.txt", "b.txt", "c.txt"])
        assert stopped.value.code == (
            "error: --data.path takes one path, not a.txt and b.txt: give a directory, or a glob "
            "in quotes"
        )


def test_values_that_are_names_of_options():
    arguments = ["--stop-at=--steps", "--steps", "3", "--part.flag"]
    assert parse_command_line(Options, arguments, "x") == Options(("--steps",), 3, Part(True))


def test_commands(capsys):
    for command, *arguments in (
        ["memory", "--preset", "hymba-125m", "--preset", "hymba-1.5b"],
        ["train", "--training.steps", "5", "--training.steps", "6"],
        ["schedule", "--image", "a.png", "--image", "b.png"],
    ):
        with pytest.raises(SystemExit) as stopped:
            cli.main([command, *arguments])
        assert stopped.value.code.startswith(f"error: {arguments[0]} is given twice: ")
    assert capsys.readouterr().out == ""


def test_no_command_parses_in_another_way():
    package = Path(hymba_jax.__file__).parent
    users = [path.name for path in package.rglob("*.py") if "tyro.cli(" in path.read_text()]
    assert users == ["command_line.py"]
