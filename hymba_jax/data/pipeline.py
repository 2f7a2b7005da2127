"""From a DataConfig to batches.

Batches depend on the stream, the seed and the step alone. Each process of a run holds the stream,
and reads the rows of a batch that its devices compute; so a run resumes exactly on another number
of processes.
"""

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import grain
import numpy as np

from hymba_jax.config.data import DataConfig
from hymba_jax.data.batch import Batch, make_row, stack_rows
from hymba_jax.data.packing import Progress, Windows, pack, window
from hymba_jax.data.sources import load_documents
from hymba_jax.data.tokenizer import Tokenizer, build_tokenizer
from hymba_jax.errors import HymbaError
from hymba_jax.types import UInt


@dataclass(frozen=True)
class Data:
    """A tokenized corpus.

    Its digests tell it from another: they are short, and of everything that decides a loss.

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

    @cached_property
    def tokenizer_digest(self) -> str:
        return self.tokenizer.fingerprint

    @cached_property
    def train_digest(self) -> str:
        return _digest(self.train.data)

    @cached_property
    def validation_digest(self) -> str:
        """Of the tokens, and the bytes that bits per byte divide by."""
        return f"{_digest(self.validation.data)} of {self.validation_bytes} bytes"

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
        tokenizer = build_tokenizer(config.tokenizer, (document.text for document in corpus.train))
    tokenized = pack([*corpus.train, *corpus.validation], tokenizer, on_progress)
    data = Data(
        tokenizer=tokenizer,
        train=np.concatenate(tokenized[: len(corpus.train)]),
        validation=np.concatenate(tokenized[len(corpus.train) :]),
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


def _digest(content: bytes | memoryview) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()


class _Batches:
    """Some rows of each batch of `batch_size` consecutive windows, a data source for Grain."""

    def __init__(
        self, windows: grain.MapDataset[Batch], batch_size: int, rows: Sequence[int]
    ) -> None:
        self._windows, self._batch_size, self._rows = windows, batch_size, rows

    def __len__(self) -> int:
        return len(self._windows) // self._batch_size

    def __getitem__(self, index: int) -> Batch:
        first = index * self._batch_size
        return stack_rows([self._windows[first + row] for row in self._rows])


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
        windows = [
            window(tokens, i, sequence_length) for i in chosen[start : start + batch_size].tolist()
        ]
        windows += [tokens[:0]] * (batch_size - len(windows))  # padding
        yield stack_rows([make_row(windows[row], sequence_length) for row in rows])
