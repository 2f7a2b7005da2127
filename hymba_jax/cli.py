"""The `hymba` command."""

import dataclasses
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import tyro

from hymba_jax.errors import HymbaError
from hymba_jax.host import prepare_host

DESCRIPTION = """Hymba in JAX.

train: trains a model.

generate: continues prompts with a trained model.

chat: talks with a model that was trained to.

warmup: compiles what generating will need.

memory: says what a model and its cache weigh.

compile: compiles a run for accelerators that need not be there, and says what it will cost.

convert: turns released weights into a model of ours, and back.

inspect: says what a checkpoint of either kind holds.

`hymba COMMAND --help` lists the options of a command."""


def main(args: Sequence[str] | None = None) -> None:
    """Runs `hymba COMMAND ...`; each command imports what it needs and no more."""
    args = sys.argv[1:] if args is None else args
    name = tyro.cli(
        Literal["train", "generate", "chat", "warmup", "memory", "compile", "convert", "inspect"],
        args=args[:1],
        prog="hymba",
        description=DESCRIPTION,
    )
    commands = (train, generate, chat, warmup, memory, compile, convert, inspect)
    {command.__name__: command for command in commands}[name](args[1:], f"hymba {name}")


def train(args: Sequence[str] | None = None, prog: str = "train.py") -> None:
    """Runs `hymba train ...`, which train.py is too."""
    with _one_line_errors():
        from hymba_jax.run_config import parse_run

        config, processes = parse_run(sys.argv[1:] if args is None else args, prog)
        prepare_host()
        from hymba_jax.distributed import started
        from hymba_jax.training import loop
        from hymba_jax.training.checkpoint import silence_orbax
        from hymba_jax.training.interrupts import one_line_interrupts

        silence_orbax()
        with (
            started(processes, config.output),
            _one_line_errors(),
            one_line_interrupts(config.output),
        ):
            try:
                loop.train(config)
            except OSError as error:
                error.filename = error.filename or config.output
                raise


def generate(args: Sequence[str], prog: str) -> None:
    """Runs `hymba generate ...`."""
    with _inference():
        from hymba_jax.inference import generate
        from hymba_jax.inference.generation_config import with_defaults

        config = tyro.cli(generate.GenerateConfig, args=args, prog=prog)
        sampling = with_defaults(config.sampling, config.choice.model, args)
        generate.main(dataclasses.replace(config, sampling=sampling))


def chat(args: Sequence[str], prog: str) -> None:
    """Runs `hymba chat ...`."""
    with _inference():
        from hymba_jax.inference import chat
        from hymba_jax.inference.generation_config import with_defaults

        config = tyro.cli(chat.ChatConfig, args=args, prog=prog)
        sampling = with_defaults(config.sampling, config.choice.model, args)
        chat.run(config.choice.load(), dataclasses.replace(config, sampling=sampling))


def warmup(args: Sequence[str], prog: str) -> None:
    """Runs `hymba warmup ...`."""
    with _inference():
        from hymba_jax.inference import warmup

        warmup.main(tyro.cli(warmup.WarmupConfig, args=args, prog=prog))


def memory(args: Sequence[str], prog: str) -> None:
    """Runs `hymba memory ...`."""
    with _one_line_errors():
        from hymba_jax.inference import memory

        memory.main(tyro.cli(memory.MemoryConfig, args=args, prog=prog))


def compile(args: Sequence[str], prog: str) -> None:
    """Runs `hymba compile ...`."""
    with _one_line_errors():
        from hymba_jax.ahead import command

        command.main(args, prog)


def convert(args: Sequence[str] | None = None, prog: str = "convert_torch.py") -> None:
    """Runs `hymba convert ...`, which convert_torch.py is too."""
    with _checkpoints():
        from hymba_jax.convert import convert

        args = sys.argv[1:] if args is None else args
        config = tyro.cli(convert.ConvertConfig, args=args, prog=prog)
        try:
            convert.main(config)
        except OSError as error:
            error.filename = error.filename or config.target
            raise


def inspect(args: Sequence[str], prog: str) -> None:
    """Runs `hymba inspect ...`."""
    with _checkpoints():
        from hymba_jax.convert import inspect

        inspect.main(tyro.cli(inspect.InspectConfig, args=args, prog=prog))


@contextmanager
def _checkpoints() -> Iterator[None]:
    """What all commands that read checkpoints share."""
    with _one_line_errors():
        try:
            prepare_host()
            from hymba_jax.training.checkpoint import silence_orbax

            silence_orbax()
            yield
        except KeyboardInterrupt:
            sys.exit(130)


@contextmanager
def _inference() -> Iterator[None]:
    """What all commands that run a model share."""
    with _checkpoints():
        from hymba_jax.inference.warmup import use_compilation_cache

        use_compilation_cache()
        yield


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
