"""The `hymba` command."""

import difflib
import io
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

import hymba_jax
from hymba_jax.command_line import parse_command_line
from hymba_jax.errors import HymbaError
from hymba_jax.host import prepare_host
from hymba_jax.remote import silence_stores

HELP = """usage: hymba COMMAND [OPTIONS]

Hymba in JAX: https://arxiv.org/abs/2411.13676

commands:
  tokenize     tokenizes a corpus once, for any number of runs
  train        trains a model
  generate     generates completions with a trained model
  chat         chats with a model that has a chat template
  serve        serves a model over HTTP, as the OpenAI API has it
  batch        answers the requests of a file, in the format of OpenAI's Batch API
  bench-serve  measures a server of that API
  evaluate     measures perplexity and bits per byte of documents, runs tasks, or finds needles
  report       writes an HTML page about a model: curves, evaluations, a look inside, costs
  warmup       compiles the programs of generation in advance
  memory       shows the memory footprint of a model, its cache and its training
  designs      compares the designs of the paper's comparison: parameters, caches and FLOPs
  schedule     shows the learning rate, data and sequence length of a run over its tokens
  compile      compiles a run ahead of time, no device needed, and shows what it will cost
  export       writes a run's parameters, or an average of them, as a standalone model
  convert      converts a Hugging Face checkpoint to a native model, and back
  inspect      shows what a checkpoint of either kind holds

options:
  -h, --help   show this help message
  --version    show the version

`hymba COMMAND --help` lists the options of a command."""

CLOSED_PIPE = 128 + 13  # what shells report of a program that SIGPIPE ended
INTERRUPTED = 128 + 2  # and SIGINT


def main(args: Sequence[str] | None = None) -> None:
    """Runs `hymba COMMAND ...`; each command imports what it needs and no more."""
    args = sys.argv[1:] if args is None else args
    commands: tuple[Callable[[Sequence[str], str], None], ...] = (
        *(tokenize, train, generate, chat, serve, batch, bench_serve, evaluate, report),
        *(warmup, memory, designs, schedule, compile, export, convert, inspect),
    )
    by_name = {command.__name__.replace("_", "-"): command for command in commands}
    name = args[0] if args else "--help"
    with _one_line_errors():
        if name in ("-h", "--help"):
            print(HELP)
        elif name == "--version":
            print(f"hymba {hymba_jax.__version__}")
        elif name in by_name:
            by_name[name](args[1:], f"hymba {name}")
        else:
            near = difflib.get_close_matches(name, by_name, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(by_name)}"
            raise HymbaError(f"hymba has no command {name!r}, {hint}")


def tokenize(args: Sequence[str], prog: str) -> None:
    """Runs `hymba tokenize ...`."""
    with _one_line_errors():
        from hymba_jax.data import tokenize_command

        tokenize_command.main(parse_command_line(tokenize_command.TokenizeConfig, args, prog))


def train(args: Sequence[str] | None = None, prog: str = "train.py") -> None:
    """Runs `hymba train ...`, which train.py is too."""
    with _ended_by_interrupts(), _one_line_errors():
        from hymba_jax.training.arguments import names_model, parse_run

        args = sys.argv[1:] if args is None else args
        config, processes = parse_run(args, prog)
        if not names_model(args):
            raise HymbaError(
                "no model is named: use --config configs/tiny.toml, or another config with a table "
                "[model], or --init-from DIRECTORY"
            )
        prepare_host()
        from hymba_jax import train as run
        from hymba_jax.checkpoint.checkpoints import silence_orbax
        from hymba_jax.parallel.processes import distributed_session
        from hymba_jax.training.interrupts import one_line_interrupts

        silence_orbax()
        with (
            distributed_session(processes, config.output),
            _one_line_errors(),
            one_line_interrupts(config.output) as interrupts,
        ):
            try:
                run.train(config, interrupts)
            except OSError as error:
                error.filename = error.filename or config.output
                raise
        interrupts.exit_if_stopped()  # only now: the processes end together


def generate(args: Sequence[str], prog: str) -> None:
    """Runs `hymba generate ...`."""
    with _inference_command():
        from hymba_jax.inference import generate
        from hymba_jax.inference.generation_config import with_defaults

        args = with_defaults(_with_leading_dashes(args, "--prompt", "--stop"))
        generate.main(parse_command_line(generate.GenerateConfig, args, prog))


def chat(args: Sequence[str], prog: str) -> None:
    """Runs `hymba chat ...`."""
    with _inference_command():
        from hymba_jax.inference import chat
        from hymba_jax.inference.generation_config import with_defaults

        args = with_defaults(_with_leading_dashes(args, "--system", "--stop"))
        config = parse_command_line(chat.ChatConfig, args, prog)
        chat.run(chat.load(config.choice, speculate=config.speculate), config)


def evaluate(args: Sequence[str], prog: str) -> None:
    """Runs `hymba evaluate ...`."""
    with _inference_command():
        from hymba_jax.evaluation import command
        from hymba_jax.parallel.processes import distributed_session

        config = parse_command_line(command.EvaluateConfig, args, prog)
        with distributed_session(config.distributed), _one_line_errors():
            command.main(config)


def report(args: Sequence[str], prog: str) -> None:
    """Runs `hymba report ...`."""
    with _inference_command():
        from hymba_jax.report import command

        command.main(parse_command_line(command.ReportConfig, args, prog))


def serve(args: Sequence[str], prog: str) -> None:
    """Runs `hymba serve ...`."""
    with _inference_command():
        with _extra("serve"):
            from hymba_jax.serving import command
        command.main(parse_command_line(command.ServeConfig, args, prog))


def batch(args: Sequence[str], prog: str) -> None:
    """Runs `hymba batch ...`."""
    with _inference_command():
        with _extra("serve"):
            from hymba_jax.serving import batch
        batch.main(parse_command_line(batch.BatchConfig, args, prog))


def bench_serve(args: Sequence[str], prog: str) -> None:
    """Runs `hymba bench-serve ...`."""
    with _one_line_errors():
        with _extra("serve"):
            from hymba_jax.serving import bench
        bench.main(parse_command_line(bench.BenchConfig, args, prog))


def warmup(args: Sequence[str], prog: str) -> None:
    """Runs `hymba warmup ...`."""
    with _inference_command():
        from hymba_jax.inference import warmup

        warmup.main(parse_command_line(warmup.WarmupConfig, args, prog))


def memory(args: Sequence[str], prog: str) -> None:
    """Runs `hymba memory ...`."""
    with _one_line_errors():
        from hymba_jax.analysis import memory

        memory.main(parse_command_line(memory.MemoryConfig, args, prog))


def designs(args: Sequence[str], prog: str) -> None:
    """Runs `hymba designs ...`."""
    with _one_line_errors():
        from hymba_jax.analysis import designs

        designs.main(parse_command_line(designs.DesignsConfig, args, prog))


def schedule(args: Sequence[str], prog: str) -> None:
    """Runs `hymba schedule ...`."""
    with _one_line_errors():
        prepare_host()
        from hymba_jax.training import schedule_command

        schedule_command.main(args, prog)


def compile(args: Sequence[str], prog: str) -> None:
    """Runs `hymba compile ...`."""
    with _one_line_errors():
        from hymba_jax.aot import command

        command.main(args, prog)


def export(args: Sequence[str], prog: str) -> None:
    """Runs `hymba export ...`."""
    with _checkpoint_command():
        from hymba_jax.convert import export

        export.main(parse_command_line(export.ExportConfig, args, prog))


def convert(args: Sequence[str] | None = None, prog: str = "convert_torch.py") -> None:
    """Runs `hymba convert ...`, which convert_torch.py is too."""
    with _checkpoint_command():
        from hymba_jax.convert import convert

        args = sys.argv[1:] if args is None else args
        config = parse_command_line(convert.ConvertConfig, args, prog)
        try:
            convert.main(config)
        except OSError as error:
            error.filename = error.filename or config.target
            raise


def inspect(args: Sequence[str], prog: str) -> None:
    """Runs `hymba inspect ...`."""
    with _checkpoint_command():
        from hymba_jax.convert import inspect

        inspect.main(parse_command_line(inspect.InspectConfig, args, prog))


@contextmanager
def _checkpoint_command() -> Iterator[None]:
    """Set-up and error handling of commands that read checkpoints."""
    with _one_line_errors():
        prepare_host()
        from hymba_jax.checkpoint.checkpoints import silence_orbax

        silence_orbax()
        yield


@contextmanager
def _inference_command() -> Iterator[None]:
    """Set-up and error handling of commands that run a model."""
    with _checkpoint_command():
        from hymba_jax.inference.warmup import use_compilation_cache

        use_compilation_cache()
        yield


@contextmanager
def _ended_by_interrupts() -> Iterator[None]:
    """Lets Ctrl-C end the process at once, as SIGTERM does, until somebody handles it in the body.

    Python's KeyboardInterrupt is lost where JAX calls back into Python, and training would begin.
    """
    before = signal.getsignal(signal.SIGINT)
    is_default = before is signal.default_int_handler
    if is_default:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        if is_default:
            signal.signal(signal.SIGINT, before)


@contextmanager
def _extra(name: str) -> Iterator[None]:
    """Says which extra has a package that is missing."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise HymbaError(
            f"{error.name} is not installed: pip install 'hymba_jax[{name}]'"
        ) from error


@contextmanager
def _one_line_errors() -> Iterator[None]:
    """Prints a HymbaError or OSError as one line and exits with status 1.

    If the reader of the output has gone (`| head`), exits silently, as after SIGPIPE. Characters
    that the output's encoding lacks are escaped.
    """
    silence_stores()
    if isinstance(sys.stdout, io.TextIOWrapper):  # Python sets up the standard error so
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        try:
            yield
        finally:
            _flush()  # while its errors can be caught
    except HymbaError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except BrokenPipeError:
        _drop_output()
        sys.exit(CLOSED_PIPE)
    except OSError as error:
        file = f"{error.filename}: " if error.filename else ""
        sys.exit(f"error: {file}{error.strerror or error}")
    except SystemExit as exit:
        if isinstance(exit.__context__, BrokenPipeError):  # raised by rich
            sys.exit(CLOSED_PIPE)
        raise


def _flush() -> None:
    """Flushes standard output."""
    try:
        sys.stdout.flush()
    except OSError:
        _drop_output()
        raise


def _drop_output() -> None:
    """Drops what is still buffered, so that Python's exit does not fail on it."""
    with suppress(io.UnsupportedOperation):  # not a file
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _with_leading_dashes(args: Sequence[str], *names: str) -> list[str]:
    """The arguments with a value such as `-x` right after one of these options attached to it.

    On its own it would be parsed as an option; -h is the only one with a single dash.
    """
    attached: list[str] = []
    for argument in args:
        if (
            attached
            and attached[-1] in names
            and argument.startswith("-")
            and not argument.startswith("--")
            and argument != "-h"
        ):
            attached[-1] += f"={argument}"
        else:
            attached.append(argument)
    return attached
