"""`hymba report`: options, and the order of work."""

import argparse
import inspect
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import jax.numpy as jnp
import numpy as np

import hymba_jax
from hymba_jax.analysis.memory import read_training
from hymba_jax.checkpoint.checkpoints import Step, loaded_step
from hymba_jax.checkpoint.load import load_model
from hymba_jax.checkpoint.model_file import read_model_directory
from hymba_jax.config import DType
from hymba_jax.config.field_types import Bounds, bound_problems
from hymba_jax.config.run import CONFIG_FILE
from hymba_jax.convert.inspect import count_by_part
from hymba_jax.convert.peft import merge_peft
from hymba_jax.display import Display, format_bytes
from hymba_jax.errors import HymbaError
from hymba_jax.files import (
    check_output_file,
    read_text,
    replace_text,
    resolve_location,
    resolve_path,
)
from hymba_jax.inference import LanguageModel
from hymba_jax.report.analyses import analyses_section
from hymba_jax.report.costs import Speed, costs_section, measure_speed
from hymba_jax.report.page import Page, Section
from hymba_jax.report.results import results_section
from hymba_jax.report.svg import page_style
from hymba_jax.report.training import read_metrics, training_section
from hymba_jax.tokenizer import Tokenizer
from hymba_jax.types import Array, Int

REPORT_BOUNDS = {
    "length": Bounds(32, 2**31 - 1, "no model has so long a context"),
    "sequences": Bounds(1, 1024, "more than an analysis needs"),
}


@dataclass(frozen=True)
class ReportConfig:
    """Writes one HTML page about a model: training curves, evaluations, a look inside, memory and
    speed. It needs no network, follows the reader's light or dark theme, and prints.

    Attributes:
      model: directory of a training run, or of a standalone model; local, gs:// or s3://.
      output: the HTML file, written atomically.
      step: which checkpoint of a run, or "best", of the lowest validation loss; the newest if
        absent.
      adapter: local directory of a PEFT adapter to merge into the model.
      dtype: of parameters, activations and cache; that of the training if absent, float32 on CPUs.
      evaluations: JSON files that `hymba evaluate --output` wrote.
      text: file in UTF-8 that the analyses read; the module argparse of Python's standard library
        if empty.
      length: tokens of each of their sequences.
      sequences: how many they read.

    Raises:
      HymbaError: a number is impossible.
    """

    model: str
    output: str
    step: Step | None = None
    adapter: str = ""
    dtype: DType | None = None
    evaluations: tuple[str, ...] = ()
    text: str = ""
    length: int = 256
    sequences: int = 4

    def __post_init__(self) -> None:
        if problems := [*bound_problems(self, REPORT_BOUNDS)]:
            raise HymbaError("; ".join(problems))


def main(config: ReportConfig) -> None:
    """Writes the page.

    Raises:
      HymbaError: there is no such model, a file cannot be read or written, or the text is short.
    """
    output = resolve_path(config.output)
    check_output_file(output)
    with Display() as display, page_style():
        replace_text(output, make_page(config, display).render())
        display.say(str(output))


def make_page(config: ReportConfig, display: Display) -> Page:
    """The page, inside `page_style`; what may be wrong with the options is found first.

    Raises:
      HymbaError: as `main`.
    """
    directory = resolve_location(config.model)
    step = loaded_step(config.model, config.step)
    architecture = read_model_directory(config.model, step)[0]
    tokenizer = Tokenizer.load(config.model)
    tokenizer.check_fits(architecture, config.model)
    paths = [resolve_path(name) for name in config.evaluations]
    results = results_section({_name(path, paths): path for path in paths})
    tokens, text_name = _tokens(config, tokenizer, architecture.max_positions)
    metrics = [line for line in read_metrics(directory) if step is None or line["step"] <= step]
    display.begin("loading the model")
    hymba = load_model(config.model, dtype=config.dtype, step=step)
    if config.adapter:
        hymba = merge_peft(resolve_path(config.adapter), hymba)
    model = LanguageModel(hymba, tokenizer)
    display.begin("measuring the speed")
    speeds = measure_speed(model, tokens.ravel().tolist())
    display.begin(f"analyzing the model on {text_name}")
    sections = [
        *([training_section(metrics)] if metrics else []),
        *([results] if paths else []),
        analyses_section(hymba, tokens, text_name),
        costs_section(model, speeds, read_training(str(directory / CONFIG_FILE))),
        Section("Configuration", source=read_text(directory / CONFIG_FILE)),
    ]
    what = [f"layers {architecture.layers}", f"vocabulary {architecture.num_embeddings:,}"]
    what += [f"step {step}"] if step is not None else []
    what += [f"adapter {config.adapter}"] if config.adapter else []
    return Page(
        title=config.model,
        subtitle=", ".join(what),
        facts=[*_facts(model, metrics, speeds)],
        sections=sections,
        footer=f"hymba_jax {hymba_jax.__version__}, {time.strftime('%Y-%m-%d')}",
    )


def _facts(
    model: LanguageModel, metrics: list[dict[str, float]], speeds: list[Speed]
) -> Iterator[tuple[str, str]]:
    """The first numbers of the page, each with what it is."""
    config, context = model.config, model.engine.max_context
    yield _short(count_by_part(config).total()), "parameters"
    validated = [line for line in metrics if line.get("validation_bits_per_byte") is not None]
    if validated:
        yield f"{validated[-1]['validation_bits_per_byte']:.3f}", "bits per byte, validation"
    if metrics and "tokens_seen" in metrics[-1]:
        yield _short(metrics[-1]["tokens_seen"]), "tokens of training"
    cache = model.engine.row_bytes(context)
    yield format_bytes(cache), f"cache at {context:,} tokens"
    if speeds:
        yield f"{speeds[-1].decode:,.0f}", f"tokens/s decoded here, {speeds[-1].batch} sequences"


def _tokens(
    config: ReportConfig, tokenizer: Tokenizer, max_positions: int
) -> tuple[Int[Array, "sequences length"], str]:
    """The sequences that are analyzed, which begin as texts in training do, and the text's name."""
    if config.text:
        text, name = read_text(resolve_location(config.text)), Path(config.text).name
    else:
        text, name = inspect.getsource(argparse), "Python's module argparse"
    if config.length > max_positions:
        raise HymbaError(
            f"length is {config.length}, the model's context is {max_positions}: give less"
        )
    bos = np.tile(np.array(tokenizer.bos_ids, np.int32), (config.sequences, 1))
    tokens, needed = tokenizer.encode(text), config.sequences * (config.length - bos.shape[1])
    if len(tokens) < needed:
        raise HymbaError(
            f"{name}: {len(tokens):,} tokens, {config.sequences} sequences of {config.length} take "
            f"{needed:,}: give a longer text, or fewer or shorter sequences"
        )
    rows = np.array(tokens[:needed], np.int32).reshape(config.sequences, -1)
    return jnp.asarray(np.concatenate([bos, rows], axis=1)), name


def _name(path: Path, paths: list[Path]) -> str:
    """The file's name, or its path where several have that name."""
    same = [other for other in paths if other.name == path.name]
    return path.name if len(same) == 1 else str(path)


def _short(count: float) -> str:
    """A number with three digits, such as 1.52B."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g}{letter}"
    return f"{count:,.0f}"
