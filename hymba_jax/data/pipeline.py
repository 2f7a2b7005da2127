"""From a DataConfig to batches.

Batches depend on the stream, the seed and the step alone. Each process of a run reads the rows of
a batch that its devices compute; so a run resumes exactly on another number of processes.
"""

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import grain
import numpy as np

from hymba_jax.config.data import DataConfig, Packing
from hymba_jax.data.batch import Batch, make_row, stack_rows
from hymba_jax.data.document_rows import DocumentRows
from hymba_jax.data.packing import Progress, Windows, pack, window
from hymba_jax.data.sources import load_documents
from hymba_jax.data.token_store import ArrayShard, TokenStore
from hymba_jax.data.tokenized import TokenizedCorpus, is_tokenized
from hymba_jax.data.tokenizer import Tokenizer, build_tokenizer
from hymba_jax.errors import HymbaError
from hymba_jax.files import resolve_location, resolve_path

type Rows = Windows | DocumentRows

_PACKINGS: dict[Packing, type[Windows] | type[DocumentRows]] = {
    "concat": Windows,
    "documents": DocumentRows,
}


@dataclass(frozen=True)
class Data:
    """A tokenized corpus.

    Attributes:
      tokenizer: what made the tokens.
      train, validation: the two streams of packed documents.
      validation_bytes: UTF-8 bytes of the validation text.
      train_digest, validation_digest: tell it from another: short, and of everything that decides
        a loss.
      notes: what a user should know of it, a line each.
    """

    tokenizer: Tokenizer
    train: TokenStore
    validation: TokenStore
    validation_bytes: int
    train_digest: str
    validation_digest: str
    notes: tuple[str, ...] = ()

    @property
    def validation_targets(self) -> int:
        """Tokens of the validation stream that are predicted, document borders among them."""
        return self.validation.num_tokens - 1

    def bits_per_byte(self, nats_per_token: float) -> float:
        """Compression of the validation text at a mean loss: comparable between tokenizers."""
        return nats_per_token / math.log(2) * self.validation_targets / self.validation_bytes

    def train_rows(self, config: DataConfig) -> Rows:
        """The rows of an epoch of training, in their order on disk."""
        return _PACKINGS[config.packing](self.train, config.sequence_length)


def prepare(
    config: DataConfig,
    tokenizer: Tokenizer | None = None,
    on_progress: Progress | None = None,
    output: str | None = None,
) -> Data:
    """Opens a corpus that is tokenized, or tokenizes one in memory.

    Args:
      tokenizer: that of a run that is resumed, or of the model that a run starts from. Without it
        a tokenized corpus has its own, and any other has what `config` asks for: a BPE is trained
        on the training documents alone.
      on_progress: follows the tokenizing.
      output: a run directory, which is no part of the corpus.

    Raises:
      HymbaError: the corpus or the tokenizer is unusable, or the training text is shorter than one
        sequence.
    """
    directory = resolve_path(config.path) if config.path else None
    if directory is not None and is_tokenized(directory):
        data = _open(directory, config, tokenizer)
    else:
        data = _tokenize(config, tokenizer, on_progress, output)
    if data.train.num_tokens <= config.sequence_length:
        raise HymbaError(
            f"{config.path or 'standard library'}: too little text for one sequence: the training "
            f"documents hold {data.train.num_tokens} tokens, one sequence takes "
            f"{config.sequence_length + 1}: add text or shorten sequence_length"
        )
    return data


def _open(directory: Path, config: DataConfig, tokenizer: Tokenizer | None) -> Data:
    """What `hymba tokenize` wrote."""
    corpus = TokenizedCorpus.open(directory)
    named = resolve_location(config.tokenizer)
    if tokenizer is None and named.exists():
        tokenizer = Tokenizer.load(named)
    if tokenizer is not None and tokenizer.fingerprint != corpus.tokenizer.fingerprint:
        raise HymbaError(
            f"{directory}: was tokenized by another tokenizer than the run's: tokenize it with "
            "that one, or set data.tokenizer to this directory and start from scratch"
        )
    if corpus.train is None or corpus.validation is None:
        side = "training" if corpus.train is None else "validation"
        raise HymbaError(
            f"{directory}: has no {side} documents: tokenize it with another "
            "--data.validation-fraction"
        )
    note = (
        f"{directory}: is tokenized: its tokenizer and validation documents are used, not "
        "data.tokenizer and data.validation_fraction"
    )
    return Data(
        tokenizer=tokenizer or corpus.tokenizer,
        train=corpus.train,
        validation=corpus.validation,
        validation_bytes=corpus.manifest.validation.text_bytes,
        train_digest=corpus.digest,
        validation_digest=corpus.digest,
        notes=(note,),
    )


def _tokenize(
    config: DataConfig,
    tokenizer: Tokenizer | None,
    on_progress: Progress | None,
    output: str | None,
) -> Data:
    """A corpus of text, in memory."""
    corpus = load_documents(config, output)
    if tokenizer is None:
        tokenizer = build_tokenizer(config.tokenizer, (document.text for document in corpus.train))
    tokenized = pack([*corpus.train, *corpus.validation], tokenizer, on_progress)
    train = np.concatenate(tokenized[: len(corpus.train)])
    validation = np.concatenate(tokenized[len(corpus.train) :])
    validation_bytes = sum(len(document.text.encode()) for document in corpus.validation)
    name = config.path or "standard library"
    left_out = f"{name}: left out of the text: {corpus.left_out}" if corpus.left_out else ""
    return Data(
        tokenizer=tokenizer,
        train=TokenStore([ArrayShard(name, train, tokenizer.eos_id)]),
        validation=TokenStore([ArrayShard(name, validation, tokenizer.eos_id)]),
        validation_bytes=validation_bytes,
        train_digest=_digest(train.data),
        # With the bytes that bits per byte divide by.
        validation_digest=f"{_digest(validation.data)} of {validation_bytes} bytes",
        notes=(left_out,) if left_out else (),
    )


def _digest(content: memoryview) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()


class _Batches:
    """Some rows of each batch of `batch_size` consecutive examples, a data source for Grain."""

    def __init__(
        self, examples: grain.MapDataset[Batch], batch_size: int, rows: Sequence[int]
    ) -> None:
        self._examples, self._batch_size, self._rows = examples, batch_size, rows

    def __len__(self) -> int:
        return len(self._examples) // self._batch_size

    def __getitem__(self, index: int) -> Batch:
        first = index * self._batch_size
        return stack_rows([self._examples[first + row] for row in self._rows])


def train_iterator(
    examples: Rows, batch_size: int, seed: int, rows: Sequence[int] | None = None
) -> grain.DatasetIterator[Batch]:
    """Endless training batches, of which those rows are read that are asked for, or all.

    Every example comes once an epoch, each epoch in another order, and batches run on across the
    end of an epoch. `get_state()` is a small dictionary for JSON, the number of batches taken;
    `set_state` of it gives the same batches from there, whatever the rows. `seed` must not be
    negative.
    """
    shuffled = grain.MapDataset.source(examples).seed(seed).shuffle().repeat()
    batches = _Batches(shuffled, batch_size, range(batch_size) if rows is None else rows)
    # All in memory or mapped: threads would only make the batches wait for one another.
    in_memory = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    return iter(grain.MapDataset.source(batches).to_iter_dataset(in_memory))


def validation_batches(
    tokens: TokenStore,
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
    count = -(-(tokens.num_tokens - 1) // sequence_length)
    chosen = np.arange(count)
    if limit is not None and limit < count:
        chosen = np.arange(limit) * count // limit
    for start in range(0, len(chosen), batch_size):
        windows = [
            window(tokens, i, sequence_length) for i in chosen[start : start + batch_size].tolist()
        ]
        windows += [tokens.read(0, 0)] * (batch_size - len(windows))  # padding
        yield stack_rows([make_row(windows[row], sequence_length) for row in rows])
