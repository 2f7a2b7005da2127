"""The `hymba` command."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import tyro

from hymba_jax.errors import HymbaError
from hymba_jax.host_memory import keep_freed_memory

DESCRIPTION = """Hymba in JAX.

train: trains a model.

generate: continues a prompt with a trained model.

`hymba COMMAND --help` lists the options of a command."""


def main(args: Sequence[str] | None = None) -> None:
    """Runs `hymba COMMAND ...`; each command imports what it needs and no more."""
    args = sys.argv[1:] if args is None else args
    name = tyro.cli(
        Literal["train", "generate"], args=args[:1], prog="hymba", description=DESCRIPTION
    )
    {"train": train, "generate": generate}[name](args[1:], f"hymba {name}")


def train(args: Sequence[str] | None = None, prog: str = "train.py") -> None:
    """Runs `hymba train ...`, which train.py is too."""
    with _one_line_errors():
        from hymba_jax.run_config import parse_run

        config = parse_run(sys.argv[1:] if args is None else args, prog)
        keep_freed_memory()
        from hymba_jax.training import loop
        from hymba_jax.training.checkpoint import silence_orbax

        silence_orbax()
        try:
            loop.train(config)
        except KeyboardInterrupt:
            print(f"\nstopped; the same command goes on with {config.output}", file=sys.stderr)
            sys.exit(130)
        except OSError as error:
            error.filename = error.filename or config.output
            raise


def generate(args: Sequence[str], prog: str) -> None:
    """Runs `hymba generate ...`."""
    with _one_line_errors():
        keep_freed_memory()
        from hymba_jax.inference import command
        from hymba_jax.training.checkpoint import silence_orbax

        silence_orbax()
        command.main(tyro.cli(command.GenerateConfig, args=args, prog=prog))


@contextmanager
def _one_line_errors() -> Iterator[None]:
    """Prints what a person can mend as one line, and exits with status 1."""
    try:
        yield
    except HymbaError as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        sys.exit(f"error: {place}{error.strerror or error}")
