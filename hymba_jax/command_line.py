"""A command line as the object that it describes."""

import re
from collections.abc import Callable, Sequence
from itertools import takewhile
from typing import Any

import tyro

from hymba_jax.errors import HymbaError


def parse_command_line[T](
    kind: Callable[..., T], args: Sequence[str], prog: str, **options: Any
) -> T:
    """The arguments as `kind`, a dataclass or a function, by `tyro.cli`.

    Args:
      options: of `tyro.cli`.

    Raises:
      HymbaError: an option is given twice, of which tyro uses the last one alone, or several paths
        of data.
      SystemExit: for --help, and for unknown options.
    """
    _check_given_once(args)
    _check_one_path(args)
    return tyro.cli(kind, args=args, prog=prog, **options)


def _check_given_once(args: Sequence[str]) -> None:
    given: set[str] = set()
    for argument in takewhile(lambda argument: argument != "--", args):
        if not argument.startswith("--"):
            continue
        written = argument.partition("=")[0].replace("_", "-")  # tyro takes both
        name = re.sub(r"^(--(?:.*\.)?)no-", r"\1", written)  # of which a flag has two
        if name in given:
            raise HymbaError(
                f"{name} is given twice: give it once, followed by all of its values if it takes "
                f"several, {name} FIRST SECOND"
            )
        given.add(name)


def _check_one_path(args: Sequence[str]) -> None:
    """Raises HymbaError for several paths of data, as of a glob that the shell has expanded."""
    for name, *values in zip(args, args[1:], args[2:], strict=False):
        if name == "--data.path" and not any(value.startswith("-") for value in values):
            raise HymbaError(
                f"--data.path takes one path, not {' and '.join(values)}: give a directory, or a "
                "glob in quotes"
            )
