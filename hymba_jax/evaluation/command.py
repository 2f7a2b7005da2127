"""`hymba evaluate`: perplexity and bits per byte of documents."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Annotated

import tyro
from rich.console import Console

from hymba_jax.config.data import Format, LossOn, OnBadRecord
from hymba_jax.config.field_types import INT64, Bounds, bound_problems
from hymba_jax.data.conversations import Conversations
from hymba_jax.data.documents import read_documents
from hymba_jax.data.listing import list_files
from hymba_jax.data.records import Content, Problem
from hymba_jax.data.text_field import TextField
from hymba_jax.errors import HymbaError
from hymba_jax.evaluation.documents import EncodedDocument, encode_documents
from hymba_jax.evaluation.perplexity import score_documents
from hymba_jax.evaluation.progress import progress_bar
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
from hymba_jax.tokenizer import Tokenizer

_MANY = "no model has so long a context"
EVALUATE_BOUNDS = {
    "window": Bounds(0, 2**31 - 1, _MANY),
    "stride": Bounds(0, 2**31 - 1, _MANY),
    "span": Bounds(0, 2**31 - 1, _MANY),
    "limit": Bounds(0, INT64 - 1, "a 64-bit number"),
    "seed": Bounds(0, INT64 - 1, "a 64-bit number"),
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
    format: Format = "text"
    loss_on: LossOn = "all"
    text_field: str = "text"
    on_bad_record: OnBadRecord = "stop"


@dataclass(frozen=True)
class EvaluateConfig:
    """Measures perplexity and bits per byte of documents, each from its own start.

    Every token is scored once. A document that is longer than the window is scored in windows,
    each of which adds the next `stride` tokens: a token is predicted from all that come before it,
    or from more than `window - stride` of them.

    Attributes:
      window: tokens that a token is predicted from, at most; the model's context if 0.
      stride: tokens between windows; half a window if 0.
      span: tokens of context of a point of the curve; a power of two for at most 16 points if 0.
      limit: the first documents only; all if 0.
      seed: of the bootstrap over documents, which gives the errors.
      output: JSON file, written atomically, with all means, the curve and each document.
      image: file for a plot of the curve and of the documents, as PNG, PDF or SVG by its suffix.

    Raises:
      HymbaError: an option is missing or impossible.
    """

    choice: Annotated[ModelChoice, tyro.conf.arg(name="")]
    data: EvaluateDataConfig = field(default_factory=EvaluateDataConfig)
    window: int = 0
    stride: int = 0
    span: int = 0
    limit: int = 0
    seed: int = 0
    output: str = ""
    image: str = ""

    def __post_init__(self) -> None:
        if problems := [*self._problems()]:
            raise HymbaError("; ".join(problems))

    def _problems(self) -> Iterator[str]:
        yield from bound_problems(self, EVALUATE_BOUNDS)
        if not self.data.path:
            yield "data.path is missing: give a file, a directory or a glob"
        if self.data.loss_on != "all" and self.data.format != "chat":
            yield "data.loss_on has no effect on text: set data.format to chat, or leave it out"
        if not self.data.text_field:
            yield "data.text_field is empty"


def main(config: EvaluateConfig) -> None:
    """Prints the means and the curve, and writes what is asked for.

    Raises:
      HymbaError: there is no such model or text, or a file cannot be written.
    """
    paths = [resolve_path(name) if name else None for name in (config.output, config.image)]
    output, image = paths
    for path in filter(None, paths):
        check_output_file(path)
    if image:
        make_figure(image, 1, 1)  # complains now, not after the evaluation
    console = Console(soft_wrap=True, highlight=False)
    report = evaluate(config.choice.load(), config, console)
    console.print(summary_table(report))
    console.print(curve_table(report))
    if output:
        text = json.dumps(report.as_json(), indent=2, ensure_ascii=False, allow_nan=False)
        replace_text(output, text + "\n")
    if image:
        draw(report, image)


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
        scores, positions = score_documents(model, documents, window, stride, advance)
    about = {
        "model": config.choice.model,
        "step": config.choice.step,
        "adapter": config.choice.adapter or None,
        "dtype": model.engine.dtype,
        "data": config.data.path,
        "window": window,
        "stride": stride,
        "seed": config.seed,
    }
    return make_report(scores, positions, about, config.span, config.seed)


def _documents(
    config: EvaluateConfig, tokenizer: Tokenizer, console: Console
) -> list[EncodedDocument]:
    data = config.data
    content: Content = TextField(data.text_field)
    if data.format == "chat":
        content = Conversations(tokenizer, data.loss_on, config.choice.model)
    listing = list_files(data.path)
    problems: list[Problem] = []
    records = read_documents(listing.files, content, data.on_bad_record, problems.append)
    documents = [*islice(encode_documents(records, tokenizer), config.limit or None)]
    for what, count in sorted(listing.skipped.items()):
        console.print(f"left out {what}: {count:,}", markup=False)
    if problems:
        note = f"skipped bad records: {len(problems):,}, such as {problems[0].name}"
        console.print(note, markup=False)
    return documents
