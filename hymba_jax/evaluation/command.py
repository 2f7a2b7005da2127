"""`hymba evaluate`: perplexity and bits per byte of documents, tasks, or needles."""

import json
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass, field, fields, replace
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console

from hymba_jax.checkpoint.checkpoints import loaded_step
from hymba_jax.config.data import DataConfig, LossOn, OnBadRecord
from hymba_jax.config.distributed import DistributedConfig
from hymba_jax.config.field_types import INT64, Bounds, bound_problems
from hymba_jax.data.content import make_content
from hymba_jax.data.corpus import STANDARD_LIBRARY, standard_library
from hymba_jax.data.documents import read_documents
from hymba_jax.data.listing import list_files
from hymba_jax.data.manifest import VALIDATION
from hymba_jax.data.records import Problem
from hymba_jax.errors import HymbaError
from hymba_jax.evaluation.documents import EncodedDocument, encode_documents
from hymba_jax.evaluation.needle import (
    NEEDLE_BOUNDS,
    NeedleConfig,
    find_needles,
    needle_table,
    save_needles,
)
from hymba_jax.evaluation.perplexity import score_documents
from hymba_jax.evaluation.progress import progress_bar
from hymba_jax.evaluation.replicas import Replicas
from hymba_jax.evaluation.report import (
    PerplexityReport,
    curve_table,
    draw,
    make_report,
    summary_table,
)
from hymba_jax.figures import make_figure
from hymba_jax.files import check_output_file, replace_text, resolve_path
from hymba_jax.inference import LanguageModel
from hymba_jax.inference.loading import ModelChoice
from hymba_jax.parallel.processes import is_main_process
from hymba_jax.tokenizer import Tokenizer

_MANY = "no model has so long a context"
EVALUATE_BOUNDS = {
    "window": Bounds(0, 2**31 - 1, _MANY),
    "stride": Bounds(0, 2**31 - 1, _MANY),
    "span": Bounds(0, 2**31 - 1, _MANY),
    "num_fewshot": Bounds(0, 10_000, _MANY),
    "limit": Bounds(0, INT64 - 1, "a 64-bit number"),
    "seed": Bounds(0, INT64 - 1, "a 64-bit number"),
}


# Options that have an effect on one of the evaluations alone, and those without on each.
_OF_DATA = ("window", "stride", "span")
_OF_TASKS = ("include_path", "num_fewshot", "apply_chat_template", "answers")
_UNUSED = {
    "data": _OF_TASKS,
    "tasks": (*_OF_DATA, "seed", "image"),
    "needles": (*_OF_DATA, *_OF_TASKS, "limit"),
}


@dataclass(frozen=True)
class EvaluateDataConfig:
    """The documents.

    Attributes:
      path: a file, a directory or a glob of text, JSON or Parquet files, compressed or not; local
        or a URL such as gs://bucket/directory.
      format: whether records are text, or conversations (`chat`), of which answers are scored.
      loss_on: whether all answers of a conversation are scored, or the last one.
      text_field: field of a JSON object, or column of Parquet, that holds the document.
      on_bad_record: whether a bad record is an error, or skipped and counted.
    """

    path: str = ""
    format: Literal["text", "chat"] = "text"
    loss_on: LossOn = "all"
    text_field: str = "text"
    on_bad_record: OnBadRecord = "stop"


@dataclass(frozen=True)
class EvaluateConfig:
    """Measures perplexity and bits per byte of documents, runs tasks of lm-evaluation-harness, or
    looks for needles in a haystack.

    Every token of a document is scored once. A document that is longer than the window is scored
    in windows, each of which adds the next `stride` tokens: a token is predicted from all that come
    before it, or from more than `window - stride` of them.

    Every device has a copy of the model and computes batches of its own, also those of several
    processes, each of which is given the same options and the same files.

    Attributes:
      window: tokens that a token is predicted from, at most; the model's context if 0.
      stride: tokens between windows; half a window if 0.
      span: tokens of context of a point of the curve; a power of two for at most 16 points if 0.
      seed: of the bootstrap over documents, which gives the errors, or of needles.
      image: file for a plot of the curve and of the documents, or of the needles, as PNG, PDF or
        SVG by its suffix.
      tasks: in place of data: names of tasks or groups, or patterns such as mmlu_*, with commas
        between them; also the paper's lists hymba_commonsense, hymba_recall, hymba_language,
        hymba_base and hymba_instruct.
      include_path: directory with the YAML files of more tasks.
      num_fewshot: examples before each question; as each task says if absent.
      apply_chat_template: asks in conversations, by the tokenizer's chat template.
      answers: file of JSON lines to which each answer is appended as it comes, and from which a
        later run with the same model takes it: an interrupted evaluation resumes.
      needle: in place of tasks, with needle.lengths: numbers in long prompts, asked for at the end.
      limit: the first documents only, of each task; all if 0.
      output: JSON file, written atomically, with all results.

    Raises:
      HymbaError: an option is missing or impossible, or would have no effect.
    """

    choice: Annotated[ModelChoice, tyro.conf.arg(name="")]
    data: EvaluateDataConfig = field(default_factory=EvaluateDataConfig)
    window: int = 0
    stride: int = 0
    span: int = 0
    seed: int = 0
    image: str = ""
    tasks: str = ""
    include_path: str = ""
    num_fewshot: int | None = None
    apply_chat_template: bool = False
    answers: str = ""
    needle: NeedleConfig = field(default_factory=NeedleConfig)
    limit: int = 0
    output: str = ""
    distributed: DistributedConfig = field(default_factory=DistributedConfig)

    def __post_init__(self) -> None:
        if problems := [*self._problems()]:
            raise HymbaError("; ".join(problems))

    def _problems(self) -> Iterator[str]:
        yield from bound_problems(self, EVALUATE_BOUNDS)
        yield from bound_problems(self.needle, NEEDLE_BOUNDS)
        given = bool(self.data.path or self.needle.lengths), bool(self.task_names)
        if given[0] == given[1]:
            yield (
                "give either data.path, a file, a directory or a glob, or tasks, or needle.lengths"
            )
        what = "needles" if self.needle.lengths else "tasks" if self.task_names else "data"
        for item in fields(self):
            if item.name in _UNUSED[what] and getattr(self, item.name) != item.default:
                yield f"{item.name} has no effect on {what}"
        if not self.data.path and self.data != EvaluateDataConfig():
            yield "data has no effect without data.path"
        if self.needle.lengths and self.data.format != "text":
            yield "data.format has no effect on needles: give a haystack of text"
        if not self.needle.lengths and self.needle != NeedleConfig():
            yield "needle has no effect without needle.lengths"
        if self.data.loss_on != "all" and self.data.format != "chat":
            yield "data.loss_on has no effect on text: set data.format to chat, or leave it out"
        if self.data.text_field != EvaluateDataConfig.text_field and self.data.format == "chat":
            yield "data.text_field has no effect on conversations: leave it out"
        if not self.data.text_field:
            yield "data.text_field is empty"
        files = [resolve_path(name).resolve() for name in self._written if name]
        if len({*files}) < len(files):
            yield "output, image and answers name the same file: give each one of its own"

    @property
    def _written(self) -> tuple[str, ...]:
        return self.output, self.image, self.answers

    @property
    def task_names(self) -> list[str]:
        return [name for name in map(str.strip, self.tasks.split(",")) if name]


def main(config: EvaluateConfig) -> None:
    """Prints the results, and writes what is asked for.

    Raises:
      HymbaError: there is no such model, text or task, or a file cannot be written.
    """
    # Named now, as a run may write others before the results are.
    step = loaded_step(config.choice.model, config.choice.step)
    config = replace(config, choice=replace(config.choice, step=step))
    if config.task_names:
        _run_tasks(config)
    elif config.needle.lengths:
        _find_needles(config)
    else:
        _measure_perplexity(config)


def _run_tasks(config: EvaluateConfig) -> None:
    from hymba_jax.evaluation import harness, tasks  # needs the harness

    output = resolve_path(config.output) if config.output else None
    if output:
        check_output_file(output)
    manager, names = tasks.load_tasks(config.task_names, config.include_path, config.num_fewshot)
    model = config.choice.load()
    if config.apply_chat_template:
        _check_chat_template(config, model.tokenizer)
    results = tasks.run_tasks(
        harness.HarnessModel(model, harness.open_answers(config.answers, model), Replicas(model)),
        names,
        manager,
        num_fewshot=config.num_fewshot,
        limit=config.limit,
        apply_chat_template=config.apply_chat_template,
    )
    if not is_main_process():
        return
    print(tasks.tables(results))
    if output:
        results["config"] |= _about_model(config.choice, model)
        tasks.write_results(results, output)


def _console() -> Console:
    """Of the main process; names of files are printed as they are."""
    return Console(soft_wrap=True, highlight=False, emoji=False, quiet=not is_main_process())


def _measure_perplexity(config: EvaluateConfig) -> None:
    output, image = _check_files(config)
    console = _console()
    report = evaluate(config.choice.load(), config, console)
    if not is_main_process():
        return
    console.print(summary_table(report))
    console.print(curve_table(report))
    if output:
        _write_json(report.as_json(), output)
    if image:
        draw(report, image)


def _find_needles(config: EvaluateConfig) -> None:
    output, image = _check_files(config)
    console = _console()
    model = config.choice.load()
    about = {
        **_about_model(config.choice, model),
        "data": config.data.path or STANDARD_LIBRARY,
        "seed": config.seed,
        "trials": config.needle.trials,
        "phrase": config.needle.phrase,
    }
    with progress_bar("reading", "batches") as advance:
        haystack = _haystack(config, model.tokenizer, console)
        report = find_needles(model, haystack, config.needle, config.seed, about, advance)
    if not is_main_process():
        return
    console.print(needle_table(report))
    if output:
        _write_json(report.as_json(), output)
    if image:
        save_needles(report, image)


def _haystack(
    config: EvaluateConfig, tokenizer: Tokenizer, console: Console
) -> Iterator[list[int]]:
    """The tokens of each document; by default of what training on this machine holds out."""
    if config.data.path:
        for encoded in _documents(config, tokenizer, console):
            yield encoded.tokens[len(tokenizer.bos_ids) :].tolist()
    else:
        corpus = standard_library(DataConfig().validation_fraction)
        for document, side in corpus.documents(corpus.files):
            if side == VALIDATION:
                yield tokenizer.encode(document.text)


def _check_files(config: EvaluateConfig) -> tuple[Path | None, Path | None]:
    """The output and the image; what is wrong with them is said now, not after the evaluation."""
    output, image = (resolve_path(name) if name else None for name in (config.output, config.image))
    for path in filter(None, (output, image)):
        check_output_file(path)
    if image:
        make_figure(image, 1, 1)
    return output, image


def _write_json(report: dict[str, Any], path: Path) -> None:
    text = json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False)
    replace_text(path, text + "\n")


def evaluate(model: LanguageModel, config: EvaluateConfig, console: Console) -> PerplexityReport:
    """The perplexity of a model that is loaded, on the config's documents.

    Args:
      console: for notes on what is left out.

    Raises:
      HymbaError: the documents cannot be read, there are none, or the window is impossible.
    """
    window = config.window or model.engine.max_context
    stride = config.stride or max(1, window // 2)
    if window > model.engine.max_context:
        raise HymbaError(
            f"window is {window} tokens, the model's context is {model.engine.max_context}: give "
            "a shorter window"
        )
    if stride > window:
        raise HymbaError(f"stride is {stride}, more than the window of {window}: give less")
    documents = _documents(config, model.tokenizer, console)
    if not any(document.is_scored.any() for document in documents):
        raise HymbaError(f"{config.data.path}: no token to score: give longer documents")
    with progress_bar("scoring", "tokens") as advance:
        scores, positions = score_documents(
            model, documents, window, stride, advance, Replicas(model)
        )
    about = {
        **_about_model(config.choice, model),
        "data": config.data.path,
        "window": window,
        "stride": stride,
        "seed": config.seed,
    }
    return make_report(scores, positions, about, config.span, config.seed)


def _about_model(choice: ModelChoice, model: LanguageModel) -> dict[str, Any]:
    """What was evaluated, for a file of results."""
    return {
        "model": choice.model,
        "step": choice.step,
        "adapter": choice.adapter or None,
        "dtype": model.engine.dtype,
        **{name: getattr(choice, name) for name in ("state_dtype", "weights", "kv_cache")},
    }


def _documents(
    config: EvaluateConfig, tokenizer: Tokenizer, console: Console
) -> list[EncodedDocument]:
    data = config.data
    if data.format == "chat":
        _check_chat_template(config, tokenizer)
    content = make_content(
        data.format, data.text_field, data.loss_on, tokenizer, config.choice.model
    )
    listing = list_files(data.path)
    problems: list[Problem] = []
    records = read_documents(listing.files, content, data.on_bad_record, problems.append)
    documents = [*islice(encode_documents(records, tokenizer), config.limit or None)]
    _check_text_field(data, documents, {file.name for file in listing.files})
    for what, count in sorted(listing.skipped.items()):
        console.print(f"left out {what}: {count:,}", markup=False)
    if problems:
        note = f"skipped records: {len(problems):,}, such as {problems[0].name}"
        console.print(note, markup=False)
    return documents


def _check_text_field(
    data: EvaluateDataConfig, documents: Sequence[EncodedDocument], files: Set[str]
) -> None:
    """Raises HymbaError if a field is named, and all documents are whole files of text.

    Args:
      files: their names; a record's is that of its file and its place.
    """
    is_named = data.text_field != EvaluateDataConfig.text_field
    if is_named and documents and all(document.name in files for document in documents):
        raise HymbaError(
            f"data.text_field {data.text_field} has no effect: {data.path} has text, and neither "
            "JSON nor Parquet: leave it out"
        )


def _check_chat_template(config: EvaluateConfig, tokenizer: Tokenizer) -> None:
    """Raises HymbaError if conversations are asked for, and nothing renders them."""
    if not tokenizer.chat_templates:
        raise HymbaError(
            f"{config.choice.model}: its tokenizer has no chat template, by which conversations "
            "are rendered: put that of its training there as chat_template.jinja, or evaluate text"
        )
