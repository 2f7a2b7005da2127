"""From a DataConfig to batches.

Batches depend on the stream, the seed and the step alone. Each process of a run holds the stream,
and reads the rows of a batch that its devices compute; so a run resumes exactly on another number
of processes.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import grain
import numpy as np

from hymba_jax.data.config import DataConfig
from hymba_jax.data.packing import IGNORED_TARGET, Progress, Windows, pack
from hymba_jax.data.sources import load_documents
from hymba_jax.data.tokenizer import Tokenizer, build_tokenizer
from hymba_jax.errors import HymbaError
from hymba_jax.types import Int, UInt

type Batch = dict[str, Int[np.ndarray, "rows length"]]
"""`inputs` and `targets`, int32, the targets one token ahead."""


@dataclass(frozen=True)
class Data:
    """A tokenized corpus.

    Attributes:
      tokenizer: what made the tokens.
      train, validation: the two streams of packed documents.
      validation_bytes: UTF-8 bytes of the validation text.
      left_out: what below `data.path` is no document, in words; empty if nothing.
    """

    tokenizer: Tokenizer
    train: UInt[np.ndarray, " train_stream"]
    validation: UInt[np.ndarray, " validation_stream"]
    validation_bytes: int
    left_out: str = ""

    @property
    def validation_targets(self) -> int:
        """Tokens of the validation stream that are predicted, document borders among them."""
        return len(self.validation) - 1

    def bits_per_byte(self, nats_per_token: float) -> float:
        """Compression of the validation text at a mean loss: comparable between tokenizers."""
        return nats_per_token / math.log(2) * self.validation_targets / self.validation_bytes


def prepare(
    config: DataConfig,
    tokenizer: Tokenizer | None = None,
    on_progress: Progress | None = None,
    output: str | None = None,
) -> Data:
    """Reads the corpus, makes the tokenizer unless one is given, and tokenizes both sides.

    A BPE is trained on the training documents only. A run that is resumed passes the tokenizer
    that it saved. `on_progress` follows the tokenizing. A run directory, `output`, is no part of
    the corpus. Raises HymbaError where the corpus or the tokenizer is unusable, or the training
    text is shorter than one sequence.
    """
    corpus = load_documents(config, output)
    if tokenizer is None:
        tokenizer = build_tokenizer(config, (document.text for document in corpus.train))
    pieces = pack([*corpus.train, *corpus.validation], tokenizer, on_progress)
    data = Data(
        tokenizer=tokenizer,
        train=np.concatenate(pieces[: len(corpus.train)]),
        validation=np.concatenate(pieces[len(corpus.train) :]),
        validation_bytes=sum(len(document.text.encode()) for document in corpus.validation),
        left_out=corpus.left_out,
    )
    if len(data.train) <= config.sequence_length:
        raise HymbaError(
            f"{config.path or 'standard library'}: too little text for one sequence: the "
            f"{len(corpus.train)} training documents hold {len(data.train)} tokens, one sequence "
            f"takes {config.sequence_length + 1}: add text or shorten sequence_length"
        )
    return data


class _Batches:
    """Some rows of each batch of `batch_size` consecutive windows, a data source for Grain."""

    def __init__(
        self, windows: grain.MapDataset[dict[str, Any]], batch_size: int, rows: Sequence[int]
    ) -> None:
        self._windows, self._batch_size, self._rows = windows, batch_size, rows

    def __len__(self) -> int:
        return len(self._windows) // self._batch_size

    def __getitem__(self, index: int) -> Batch:
        windows = [self._windows[index * self._batch_size + row] for row in self._rows]
        return {name: np.stack([window[name] for window in windows]) for name in windows[0]}


def train_iterator(
    tokens: UInt[np.ndarray, " stream"],
    sequence_length: int,
    batch_size: int,
    seed: int,
    rows: Sequence[int] | None = None,
) -> grain.DatasetIterator[Batch]:
    """Endless training batches, of which those rows are read that are asked for, or all.

    Every window comes once an epoch, each epoch in another order, and batches run on across the
    end of an epoch. `get_state()` is a small dictionary for JSON, the number of batches taken;
    `set_state` of it gives the same batches from there, whatever the rows. `seed` must not be
    negative.
    """
    windows = grain.MapDataset.source(Windows(tokens, sequence_length))
    windows = windows.seed(seed).shuffle().repeat()
    batches = _Batches(windows, batch_size, range(batch_size) if rows is None else rows)
    # All in memory: threads would only make the batches wait for one another.
    in_memory = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    return iter(grain.MapDataset.source(batches).to_iter_dataset(in_memory))


def validation_batches(
    tokens: UInt[np.ndarray, " stream"],
    sequence_length: int,
    batch_size: int,
    limit: int | None = None,
    rows: Sequence[int] | None = None,
) -> Iterator[Batch]:
    """The stream's windows in order, `batch_size` a batch, the same at every call.

    Every token but the first is a target once; positions past the end have the target
    IGNORED_TARGET, so that all batches have one shape. With a `limit` below the windows that there
    are, that many are read, spread evenly over the stream, whatever the batch size. A batch has
    those rows that are asked for, or all.
    """
    rows = range(batch_size) if rows is None else rows
    count = -(-(len(tokens) - 1) // sequence_length)
    chosen = np.arange(count)
    if limit is not None and limit < count:
        chosen = np.arange(limit) * count // limit
    for start in range(0, len(chosen), batch_size):
        indices = chosen[start : start + batch_size]
        inputs = np.zeros((len(rows), sequence_length), np.int32)
        targets = np.full((len(rows), sequence_length), IGNORED_TARGET, np.int32)
        for i, row in enumerate(rows):
            if row >= len(indices):
                continue
            index = indices[row]
            window = tokens[index * sequence_length : (index + 1) * sequence_length + 1]
            inputs[i, : len(window) - 1] = window[:-1]
            targets[i, : len(window) - 1] = window[1:]
        yield {"inputs": inputs, "targets": targets}
