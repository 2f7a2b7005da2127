"""`hymba generate`: prompts continued, one as it comes or many at a time."""

import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from hymba_jax.errors import HymbaError
from hymba_jax.files import parse_json, read_text, replace_text, resolve_path
from hymba_jax.inference.engine import STEPS
from hymba_jax.inference.language_model import Completion, Piece, collect
from hymba_jax.inference.loading import ModelChoice
from hymba_jax.inference.sampling import SamplingConfig


@dataclass(frozen=True)
class GenerateConfig:
    """Continues prompts with a trained model.

    Attributes:
      prompt: texts to continue; without any, and without a file, a text is begun.
      file: more prompts, one a line, or for *.jsonl the field "prompt" of each line; - is standard
        input.
      output: file to write to, whole or not at all; standard output if absent.
      format: "text" is each prompt with its continuation, "json" a line for each continuation with
        its tokens and their log-probabilities.
      parse_special: names of control tokens in prompts, such as <s>, are these tokens; else they
        are ordinary text.
    """

    choice: Annotated[ModelChoice, tyro.conf.arg(name="")]
    sampling: Annotated[SamplingConfig, tyro.conf.arg(name="")] = field(
        default_factory=SamplingConfig
    )
    prompt: tuple[str, ...] = ()
    file: str = ""
    output: str = ""
    format: Literal["text", "json"] = "text"
    parse_special: bool = False


def main(config: GenerateConfig) -> None:
    """Writes the continuations to the output.

    Raises:
      HymbaError: there is no such model or file, or the model cannot do what is asked.
    """
    output = resolve_path(config.output) if config.output else None
    if output:
        _check_output(output)
    prompts = [*config.prompt, *_file_prompts(config.file)]
    if not prompts and not config.file:
        prompts = [""]
    model = config.choice.load()
    special = config.parse_special
    count = len(prompts) * config.sampling.num_samples
    if count == 1 and config.format == "text" and not output:
        _write_as_it_comes(
            prompts[0], model.stream(prompts, config.sampling, parse_special=special)
        )
        return
    pieces = _with_progress(
        model.stream(prompts, config.sampling, every=STEPS, parse_special=special), count
    )
    text = "".join(_lines(prompts, collect(pieces), config.format))
    if output:
        replace_text(output, text)
    else:
        sys.stdout.write(text)


def _check_output(path: Path) -> None:
    """Raises HymbaError if no file can be there, before any work is done for it."""
    if path.is_dir():
        raise HymbaError(f"{path}: is a directory, name a file")
    if not path.parent.is_dir():
        raise HymbaError(f"{path}: there is no directory {path.parent}")


def _file_prompts(name: str) -> list[str]:
    if not name:
        return []
    place = "standard input" if name == "-" else name
    try:
        text = sys.stdin.read() if name == "-" else read_text(resolve_path(name))
    except UnicodeDecodeError as error:
        raise HymbaError(f"{place}: no text: it has bytes that are not UTF-8") from error
    lines = [(i, line) for i, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise HymbaError(f"{place}: there are no prompts in it")
    if not name.endswith(".jsonl"):
        return [line for _, line in lines]
    return [_json_prompt(f"{name}, line {i}", line) for i, line in lines]


def _json_prompt(place: str, line: str) -> str:
    try:
        record = parse_json(line)
    except ValueError as error:
        raise HymbaError(f"{place}: broken JSON ({error})") from error
    prompt = record.get("prompt") if isinstance(record, dict) else None
    if not isinstance(prompt, str):
        raise HymbaError(f"{place}: no field 'prompt' that is a text")
    return prompt


def _write_as_it_comes(prompt: str, pieces: Iterable[Piece]) -> None:
    print(prompt, end="", flush=True)
    for piece in pieces:
        print(piece.text, end="", flush=True)
    print()


def _with_progress(pieces: Iterable[Piece], count: int) -> Iterator[Piece]:
    """The pieces, with a bar of the finished continuations on standard error."""
    columns = (
        *Progress.get_default_columns()[:2],
        MofNCompleteColumn(),
        TextColumn("{task.fields[tokens]} tokens"),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    disable = not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=disable) as progress:
        task, tokens = progress.add_task("generating", total=count, tokens=0), 0
        for piece in pieces:
            tokens += len(piece.tokens)
            progress.update(task, advance=piece.finish_reason is not None, tokens=tokens)
            yield piece


def _lines(
    prompts: list[str], completions: list[Completion], form: Literal["text", "json"]
) -> Iterator[str]:
    for completion in completions:
        prompt = prompts[completion.index]
        if form == "json":
            yield json.dumps({"prompt": prompt, **asdict(completion)}, ensure_ascii=False) + "\n"
        else:
            yield f"{prompt}{completion.text}\n"
