"""`hymba generate`: completions of prompts, one as it comes or many at a time."""

import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from hymba_jax.config.sampling import SamplingConfig
from hymba_jax.errors import HymbaError
from hymba_jax.files import (
    check_output_file,
    json_text,
    parse_json,
    read_text,
    replace_text,
    resolve_path,
)
from hymba_jax.inference.completion_stream import Delta
from hymba_jax.inference.language_model import Completion, collect
from hymba_jax.inference.loading import ModelChoice
from hymba_jax.inference.programs import DECODE_STEPS
from hymba_jax.inference.prompts import prompt_name

_LINE_BREAK = re.compile("\r\n|\r|\n")
OUTPUT_FIELDS = frozenset(item.name for item in fields(Completion))


@dataclass(frozen=True)
class GenerateConfig:
    """Generates completions of prompts with a trained model.

    Attributes:
      prompt: without any, and without a file, one empty prompt. One that begins with a dash comes
        right after the option, one with two dashes as --prompt=--x.
      file: more prompts, one per line, or for *.jsonl the field "prompt" of each line; - is
        standard input.
      output: file, written atomically; standard output if absent.
      format: "text" is each prompt with its completion, each after a line "--- prompt 1, sample 1
        ---" where there are several; "json" is a line for each completion with its tokens and
        their log-probabilities, and the other fields of a prompt from a *.jsonl file.
      speculate: with one completion at a time, draft what comes next from what the text said
        before, where that pays; its tokens are the same, up to the rounding of matmuls of several
        tokens and, with state_dtype bfloat16, of states, once for all of these tokens.
      parse_special: parse names of control tokens in prompts, such as <s>; else they are ordinary
        text.
    """

    choice: Annotated[ModelChoice, tyro.conf.arg(name="")]
    sampling: Annotated[SamplingConfig, tyro.conf.arg(name="")] = field(
        default_factory=SamplingConfig
    )
    prompt: tuple[str, ...] = ()
    file: str = ""
    output: str = ""
    format: Literal["text", "json"] = "text"
    speculate: bool = False
    parse_special: bool = False


@dataclass(frozen=True)
class PromptRecord:
    """A prompt, and the other fields of the line that it comes from."""

    text: str
    fields: Mapping[str, Any] = field(default_factory=dict)


def main(config: GenerateConfig) -> None:
    """Writes the completions to the output, and notes on truncated ones to standard error.

    Raises:
      HymbaError: there is no such model or file, or the model cannot do what is asked.
    """
    output = resolve_path(config.output) if config.output else None
    if output:
        check_output_file(output, [] if config.file in ("", "-") else [resolve_path(config.file)])
    records = [*map(PromptRecord, config.prompt), *_file_prompts(config.file, config.format)]
    if not records and not config.file:
        records = [PromptRecord("")]
    prompts = [record.text for record in records]
    count = len(prompts) * config.sampling.num_samples
    if config.speculate and (together := min(count, config.choice.batch_size)) > 1:
        raise HymbaError(
            f"speculate has no effect on {together} completions at the same time: leave it out, or "
            "set batch_size to 1"
        )
    model = config.choice.load(speculate=config.speculate)
    special = config.parse_special
    if count == 1 and config.format == "text" and not output:
        deltas = model.stream(prompts, config.sampling, parse_special=special)
        completions = collect(_written_as_they_come(prompts[0], deltas))
    else:
        deltas = model.stream(
            prompts, config.sampling, stream_interval=DECODE_STEPS, parse_special=special
        )
        completions = collect(_with_progress(deltas, count))
        text = "".join(_lines(records, completions, config.format))
        if output:
            replace_text(output, text)
        else:
            sys.stdout.write(text)
    for line in _shortened(completions, config.sampling, model.engine.max_context, len(prompts)):
        print(line, file=sys.stderr)


def _file_prompts(name: str, form: Literal["text", "json"]) -> list[PromptRecord]:
    if not name:
        return []
    place = "standard input" if name == "-" else name
    text = _standard_input() if name == "-" else read_text(resolve_path(name))
    lines = [(i, line) for i, line in enumerate(_LINE_BREAK.split(text), 1) if line.strip()]
    if not lines:
        raise HymbaError(f"{place}: there are no prompts in it")
    if not name.endswith(".jsonl"):
        return [PromptRecord(line) for _, line in lines]
    return [_json_prompt(f"{name}, line {i}", line, form) for i, line in lines]


def _standard_input() -> str:
    """UTF-8 as in files, whatever the locale, without a byte order mark."""
    try:
        return sys.stdin.buffer.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise HymbaError(f"standard input: not UTF-8 text (byte {error.start})") from error


def _json_prompt(place: str, line: str, form: Literal["text", "json"]) -> PromptRecord:
    try:
        record = parse_json(line)
    except ValueError as error:
        raise HymbaError(f"{place}: broken JSON ({error})") from error
    prompt = record.get("prompt") if isinstance(record, dict) else None
    if not isinstance(prompt, str):
        raise HymbaError(f"{place}: no field 'prompt' that is a string")
    if form == "json" and (clash := sorted(OUTPUT_FIELDS & record.keys())):
        raise HymbaError(
            f"{place}: the output has a field {clash[0]!r} of its own: rename the prompt's"
        )
    return PromptRecord(prompt, {name: v for name, v in record.items() if name != "prompt"})


def _written_as_they_come(prompt: str, deltas: Iterable[Delta]) -> Iterator[Delta]:
    print(prompt, end="", flush=True)
    for delta in deltas:
        print(delta.text, end="", flush=True)
        yield delta
    print()


def _with_progress(deltas: Iterable[Delta], count: int) -> Iterator[Delta]:
    """The deltas, with a bar of the finished completions on standard error."""
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
        for delta in deltas:
            tokens += len(delta.tokens)
            progress.update(task, advance=delta.finish_reason is not None, tokens=tokens)
            yield delta


def _lines(
    records: Sequence[PromptRecord],
    completions: Sequence[Completion],
    form: Literal["text", "json"],
) -> Iterator[str]:
    for completion in completions:
        record = records[completion.index]
        if form == "json":
            line = {"prompt": record.text, **record.fields, **asdict(completion)}
            yield json_text(line) + "\n"
        else:
            if len(completions) > 1:
                yield f"--- prompt {completion.index + 1}, sample {completion.sample + 1} ---\n"
            yield f"{record.text}{completion.text}\n"


def _shortened(
    completions: Sequence[Completion], sampling: SamplingConfig, context: int, count: int
) -> Iterator[str]:
    """Notes on prompts whose completions ended because the context was full."""
    tokens = {c.index: len(c.tokens) for c in completions if c.context_full}
    for index, room in tokens.items():
        yield (
            f"note: {prompt_name(index, count)}: only {room} of "
            f"{sampling.max_new_tokens} new tokens fit: the model's context is {context} tokens"
        )
