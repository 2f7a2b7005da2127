"""A cell of `recall.py`: one design, trained on one task from one seed, and what it scores.

All designs have two layers, or two pairs of them, of one width, and as wide an MLP as makes their
layers' parameters equal. Generated tasks are trained on at all of their sizes at once, as documents
packed into rows of one length, so that a design is compiled once for all of them.
"""

import dataclasses
import math
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from hymba_jax.checkpoint.train_state import TrainState, abstract_train_state, init_state
from hymba_jax.config import AttentionConfig, ComputeConfig, HymbaConfig, SSMConfig
from hymba_jax.config.data import DataConfig, RecallName
from hymba_jax.config.training import TrainingConfig
from hymba_jax.convert.inspect import count_by_part
from hymba_jax.data import (
    IGNORED_TARGET,
    Batch,
    Data,
    open_data,
    tokenize_sources,
    train_batches,
    validation_batches,
)
from hymba_jax.data.batch import abstract_batch
from hymba_jax.data.recall import RecallTask, mixed_batch
from hymba_jax.display import Display
from hymba_jax.host import prepare_host
from hymba_jax.inference.warmup import use_compilation_cache
from hymba_jax.model import Hymba
from hymba_jax.parallel.mesh import batch_sharding, make_mesh
from hymba_jax.training.loss import (
    Average,
    Averages,
    add_averages,
    make_loss_fn,
    means,
    next_token_loss,
)
from hymba_jax.training.optimizer import make_optimizer
from hymba_jax.training.step import compile_train_step, make_train_step
from hymba_jax.types import Array

type TaskName = Literal[RecallName, "language"]

HIDDEN_SIZE = 192

ATTENTION = AttentionConfig(num_heads=4, num_kv_heads=2, window=16)
EQUAL_WIDTHS = dataclasses.replace(ATTENTION, value_dim=HIDDEN_SIZE // ATTENTION.num_heads)
"""Values as wide as keys, as in Llama and Samba; Hymba's are twice as wide."""

DESIGNS: dict[str, dict[str, Any]] = {
    "llama": {"layers": "2*A", "attention": EQUAL_WIDTHS},
    "sequential": {"layers": "2*A-M"},
    "hymba": {"layers": "G W", "num_meta_tokens": 8},
    "hymba_global_last": {"layers": "W G", "num_meta_tokens": 8},
    "mamba": {"layers": "2*M"},
    "mamba2": {"layers": "2*S"},
    "samba": {"layers": "M L", "attention": EQUAL_WIDTHS},
}
"""What differs between them."""

SIZES: dict[RecallName, tuple[tuple[int, int], ...]] = {
    "mqar": ((2, 8), (4, 16), (8, 32), (16, 64), (32, 128), (8, 64), (8, 128)),
    "selective_copying": ((2, 8), (4, 16), (8, 32), (16, 64)),
    "induction": ((1, 8), (1, 16), (1, 32), (1, 64), (1, 128)),
}
"""Pairs and lengths of each task, the shortest first."""

EMBEDDING_SCALE = 10.0
"""Of the generated tasks' embeddings at the start: updates of Adam's size soon make small ones
alike, and attention alone then finds no keys."""

SHORT_SHARE = 0.4
"""Of the steps, how many are on the shortest size alone: how long it takes until keys are found
grows with the square of the length (arXiv 2511.01033), and what finds them is the same."""

VOCAB_SIZE = 66  # of the generated tasks: 32 keys, 32 values
ROW_LENGTH, WINDOW_LENGTH = 128, 256  # tokens of a row of generated tasks, and of text
HELD_OUT_SEED = 2**31  # of rows that no seed of training has
HELD_OUT_ROWS = 128


@dataclass(frozen=True)
class Cell:
    """All that scores depend on, beside what is written in this file.

    Attributes:
      steps: of training.
      tokens: of a step.
      learning_rate: the highest.
      kiloparameters: thousands of parameters in the layers of a design.
    """

    task: TaskName
    design: str
    seed: int
    steps: int
    tokens: int
    learning_rate: float
    kiloparameters: int


class Budget(NamedTuple):
    """Steps of training on a task, and tokens of a step: a multiple of a row of it."""

    steps: int
    tokens: int


BUDGETS: dict[TaskName, Budget] = {
    "mqar": Budget(700, 512),
    "selective_copying": Budget(700, 512),
    "induction": Budget(350, 512),
    "language": Budget(200, 1024),
}


class Programs(NamedTuple):
    """Compiled for one shape of a batch."""

    init: Callable[[int], TrainState]
    step: Callable[[TrainState, Batch], tuple[TrainState, Any]]
    evaluate: Callable[[Any, Batch], Averages]
    parameters: int


def train_all(
    cells: Sequence[Cell], directory: Path, processes: int
) -> Iterator[tuple[Cell, dict[str, Any]]]:
    """Trains cells, several at a time: each with its result, as they are finished."""
    if any(cell.task == "language" for cell in cells):
        open_text(directory)  # once, before processes need it
    context = multiprocessing.get_context("spawn")
    numbers = context.SimpleQueue()
    for number in range(processes):
        numbers.put(number)
    with ProcessPoolExecutor(processes, context, _prepare_process, (numbers,)) as pool:
        futures = {pool.submit(train, cell, directory): cell for cell in cells}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _prepare_process(numbers: "multiprocessing.SimpleQueue[int]") -> None:
    """Takes one core: models as small as these are not faster on two."""
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[numbers.get() % len(cores)]})
    prepare_host()
    use_compilation_cache()


def train(cell: Cell, directory: Path) -> dict[str, Any]:
    """Trains a cell: its scores by size, its parameters, and the seconds without compiling.

    The score of a generated task is the share of answers that are the likeliest token, on rows
    that are not in training; that of text is bits per byte of held-out documents.

    Args:
      directory: for the tokens of the text.
    """
    if cell.task == "language":
        return _train_on_text(cell, open_text(directory))
    tasks = {
        f"{pairs} in {length}": RecallTask(cell.task, length, pairs, VOCAB_SIZE)
        for pairs, length in SIZES[cell.task]
    }
    rows = cell.tokens // ROW_LENGTH
    programs = compile_programs(config_of(cell, VOCAB_SIZE), _training(cell, rows), ROW_LENGTH)
    start = time.perf_counter()
    all_sizes = [*tasks.values()]
    shortest, short_steps = all_sizes[:1], round(SHORT_SHARE * cell.steps)
    batches = (
        mixed_batch(
            shortest if step < short_steps else all_sizes, cell.seed, step, rows, ROW_LENGTH
        )
        for step in range(cell.steps)
    )
    state = _fit(programs, cell.seed, batches)
    scores = {
        size: _evaluate(
            programs,
            state,
            (
                mixed_batch([task], HELD_OUT_SEED, step, rows, ROW_LENGTH)
                for step in range(math.ceil(HELD_OUT_ROWS / rows))
            ),
        )["accuracy"]
        for size, task in tasks.items()
    }
    return _result(scores, programs, start)


def _train_on_text(cell: Cell, data: Data) -> dict[str, Any]:
    rows, config = cell.tokens // WINDOW_LENGTH, text_config()
    programs = compile_programs(
        config_of(cell, data.tokenizer.vocab_size), _training(cell, rows), WINDOW_LENGTH
    )
    start = time.perf_counter()
    (examples,) = data.train_examples([(config, cell.steps * rows)], cell.seed)
    state = _fit(programs, cell.seed, islice(train_batches(examples, rows), cell.steps))
    (held_out,) = data.validation_sets(config).values()
    loss = _evaluate(programs, state, validation_batches(held_out.rows, rows, HELD_OUT_ROWS))[
        "loss"
    ]
    bits = held_out.bits_per_byte(loss)
    assert bits is not None  # the source is text
    return _result({"bits per byte": bits}, programs, start)


def _fit(programs: Programs, seed: int, batches: Iterator[Batch]) -> TrainState:
    state = programs.init(seed)
    for batch in batches:
        state, _ = programs.step(state, jax.tree.map(jnp.asarray, batch))
    return state


def _evaluate(programs: Programs, state: TrainState, batches: Iterator[Batch]) -> dict[str, float]:
    averages = (
        programs.evaluate(state.params, jax.tree.map(jnp.asarray, batch)) for batch in batches
    )
    return means(add_averages(averages))


def _result(scores: dict[str, float], programs: Programs, start: float) -> dict[str, Any]:
    seconds = round(time.perf_counter() - start, 1)
    return {"scores": scores, "parameters": programs.parameters, "seconds": seconds}


def _training(cell: Cell, rows: int) -> TrainingConfig:
    """Muon, whose updates have one size in all designs."""
    return TrainingConfig(
        optimizer="muon",
        steps=cell.steps,
        batch_size=rows,
        schedule="wsd",
        learning_rate=cell.learning_rate,
        min_learning_rate=cell.learning_rate / 100,
        decay_fraction=0.3,
    )


def config_of(cell: Cell, vocab_size: int) -> HymbaConfig:
    """The design, with the MLP that makes its layers as large as the others'."""
    base = HymbaConfig(
        vocab_size=vocab_size,
        hidden_size=HIDDEN_SIZE,
        mlp_size=1,
        attention=ATTENTION,
        ssm=SSMConfig(head_dim=32),
        num_meta_tokens=0,
        max_positions=WINDOW_LENGTH,
        # Keys are never targets: tied, their embeddings would all be pushed in the same direction.
        tie_embeddings=cell.task == "language",
    )
    base = dataclasses.replace(base, **DESIGNS[cell.design])
    num_mlps = sum(spec.mlp for spec in base.layer_specs)
    parts = count_by_part(base)
    layers = parts.total() - parts["embedding"] - parts["output projection"]
    missing = 1000 * cell.kiloparameters - layers
    more = round(missing / (3 * base.hidden_size * num_mlps))
    return dataclasses.replace(base, mlp_size=base.mlp_size + more)


@cache
def compile_programs(config: HymbaConfig, training: TrainingConfig, length: int) -> Programs:
    """What training and evaluating a design take, for rows of so many tokens."""
    compute, mesh = ComputeConfig(dtype="bfloat16"), make_mesh(jax.devices()[:1])
    optimizer = make_optimizer(training)
    abstract = abstract_train_state(config, compute, optimizer, mesh)
    batch = abstract_batch(
        training.batch_size, length, batch_sharding(mesh), segment_ids=length == ROW_LENGTH
    )
    step = make_train_step(
        make_loss_fn(next_token_loss, abstract.graph),
        optimizer,
        micro_batch_size=training.batch_size,
    )

    def init(seed: int) -> TrainState:
        state = init_state(config, compute, optimizer, abstract, seed)
        return state if config.tie_embeddings else _with_larger_embeddings(state)

    return Programs(
        jax.jit(init),
        compile_train_step(step, abstract.state, batch),
        jax.jit(make_loss_fn(recall_objective, abstract.graph)),
        abstract.num_params,
    )


def _with_larger_embeddings(state: TrainState) -> TrainState:
    def larger(path: tuple[Any, ...], param: Array) -> Array:
        return EMBEDDING_SCALE * param if path[-1].key == "embedding" else param

    return state._replace(params=jax.tree.map_with_path(larger, state.params))


def recall_objective(model: Hymba, batch: Batch) -> Averages:
    """The loss, and how many of the answers are the likeliest token."""
    is_answer = batch.targets != IGNORED_TARGET
    likeliest = model(batch.inputs, batch.segment_ids).argmax(-1)
    right = (likeliest == batch.targets) & is_answer
    averages = next_token_loss(model, batch)
    return averages | {"accuracy": Average(right.sum(), is_answer.sum())}


def text_config() -> DataConfig:
    """The demo's: the standard library's sources."""
    return DataConfig(tokenizer="bpe:4096", sequence_length=WINDOW_LENGTH)


@cache
def open_text(directory: Path) -> Data:
    """The demo's text, tokenized once."""
    config = text_config()
    tokenize_sources(config, None, str(directory), lambda _: None, Display(quiet=True))
    return open_data(config, None, str(directory))
