"""From a DataConfig to batches.

Batches depend on the sources, the seed and the step alone. Each process of a run reads the rows of
a batch that its devices compute; so a run resumes exactly on another number of processes.
"""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import TypeGuard

import grain
import jax
import numpy as np

from hymba_jax.config.data import DataConfig, Packing
from hymba_jax.data.batch import IGNORED_TARGET, Batch, stack_rows
from hymba_jax.data.conversation_rows import ConversationRows
from hymba_jax.data.document_rows import DocumentRows
from hymba_jax.data.examples import Examples, Read, Rows
from hymba_jax.data.mixture import Mixture
from hymba_jax.data.preference_rows import PreferenceRows
from hymba_jax.data.recall_rows import RecallRows, RecallSource
from hymba_jax.data.sources import Source, Tokens, open_sources
from hymba_jax.data.token_store import TokenStore
from hymba_jax.data.windows import Windows
from hymba_jax.errors import HymbaError
from hymba_jax.tokenizer import Tokenizer


@dataclass(frozen=True)
class ValidationSet:
    """A source of validation.

    Attributes:
      rows: all of it; every token that is predicted is a target once.
      text_bytes: UTF-8 bytes of the text; None of conversations and of generated tasks, whose
        answers alone are predicted.
    """

    rows: Rows
    text_bytes: int | None

    @property
    def loss_weight(self) -> int:
        """What the loss is a mean over: pairs, or tokens that are predicted."""
        rows = self.rows
        return rows.num_pairs if isinstance(rows, PreferenceRows) else rows.num_targets

    def bits_per_byte(self, nats_per_token: float) -> float | None:
        """Compression of the text at a mean loss: comparable between tokenizers.

        The bytes are of all tokens. Of documents that do not begin with a BOS token, the first
        token is no target where they are packed, so that this is a little too low, the more the
        shorter they are; `hymba evaluate` counts the bytes of scored tokens alone.
        """
        if self.text_bytes is None:
            return None
        return nats_per_token / math.log(2) * self.rows.num_targets / self.text_bytes


@dataclass(frozen=True)
class Data:
    """The data of a run, opened.

    Attributes:
      tokenizer: what made the tokens.
      train, validation: the tokens or the task, by source.
      notes: what a user should know of it, a line each.
    """

    tokenizer: Tokenizer
    train: Mapping[str, Source]
    validation: Mapping[str, Source]
    notes: tuple[str, ...] = ()

    @property
    def num_tokens(self) -> int:
        """Tokens of all sources of training that are not generated."""
        return sum(
            tokens.store.num_tokens
            for tokens in self.train.values()
            if not isinstance(tokens, RecallSource)
        )

    def validated(self, names: Collection[str] = (), *, preferences: bool) -> dict[str, Source]:
        """The sources of validation, or those with these names, that are pairs, or that are not."""
        return {
            name: tokens
            for name, tokens in self.validation.items()
            if tokens.is_preference == preferences and (name in names or not names)
        }

    @property
    def digests(self) -> dict[str, str]:
        """Tell the tokens of each source from others."""
        train = {f"training source {name}": tokens.digest for name, tokens in self.train.items()}
        return train | {
            f"validation source {name}": tokens.digest for name, tokens in self.validation.items()
        }

    def train_examples(self, stages: Sequence[tuple[DataConfig, int]], seed: int) -> list[Examples]:
        """The endless examples of each stage.

        A stage goes on in each source where the one before it stopped, if rows are the same in both
        (`sequence_length` and `packing`); else another order of the source's rows begins.

        Args:
          stages: what each reads, and how many examples.
          seed: of the order; not negative.

        Raises:
          HymbaError: a source is shorter than one sequence, or its documents cannot be packed.
        """
        examples: list[Examples] = []
        order, taken, before = 0, dict[str, int](), None
        read: dict[str, Read] = {}
        for config, num_examples in stages:
            rows_of = config.packing, config.sequence_length
            if before not in (None, rows_of):
                order, taken = order + 1, {}
            mixture = Mixture({name: config.train_sources[name].weight for name in self.train})
            rows = {name: self._train_rows(name, config) for name in mixture.shares}
            examples.append(Examples(rows, mixture, seed, order, taken, read))
            taken, before = examples[-1].counts(num_examples), rows_of
            read = examples[-1].read(num_examples)
        return examples

    def _train_rows(self, name: str, config: DataConfig) -> Rows:
        tokens, length = self.train[name], config.sequence_length
        path = config.train_sources[name].path or "standard library"
        if not _is_text(tokens):
            return _isolated_rows(path, tokens, "packing", config)
        store = tokens.store
        rows = make_rows(store, config.packing, length)
        if not len(rows):
            raise HymbaError(
                f"{path}: too little text for one sequence: the training documents hold "
                f"{store.num_tokens} tokens, one sequence takes {length + 1}: add text or "
                "shorten sequence_length"
            )
        return rows

    def validation_sets(
        self, config: DataConfig, names: Collection[str] = (), *, preferences: bool = False
    ) -> dict[str, ValidationSet]:
        """All validation documents, as rows of the config's length and packing, by source.

        Args:
          names: those sources alone.
          preferences: those of pairs, in place of the others.

        Raises:
          HymbaError: a source has conversations that do not fit, or nothing to predict.
        """
        sets = {}
        for name, tokens in self.validated(names, preferences=preferences).items():
            packing, length = config.validation_packing, config.sequence_length
            source = f"validation source {name}"
            rows = (
                make_rows(tokens.store, packing, length, keep_last=True)
                if _is_text(tokens)
                else _isolated_rows(source, tokens, "validation_packing", config)
            )
            sets[name] = ValidationSet(rows, self._validation_bytes[name])
            if not sets[name].loss_weight:
                raise HymbaError(
                    f"{source}: no token is predicted, as its documents have one token each or "
                    "their answers are cut off: give longer documents, or raise sequence_length"
                )
        return sets

    def validation_left_out(
        self, config: DataConfig, names: Collection[str] = (), *, preferences: bool = False
    ) -> list[str]:
        """Which conversations of each source of validation are left out, in words, a line each."""
        return [
            f"validation source {name}: {line}"
            for name, each in self.validation_sets(config, names, preferences=preferences).items()
            if isinstance(each.rows, ConversationRows) and (line := each.rows.describe_left_out())
        ]

    @cached_property
    def _validation_bytes(self) -> dict[str, int | None]:
        """UTF-8 bytes of each source of validation, None where answers alone are predicted."""
        return {
            name: _text_bytes(tokens, self.tokenizer) if _is_text(tokens) else None
            for name, tokens in self.validation.items()
        }


def open_data(config: DataConfig, tokenizer: Tokenizer | None, output: str) -> Data:
    """Opens the data of a run, all of whose text `tokenize_sources` has tokenized.

    Args:
      tokenizer: that of a run that is resumed, or of the model that a run starts from.
      output: the run directory.

    Raises:
      HymbaError: a source is unusable.
    """
    sources = open_sources(config, tokenizer, output)
    _check_chat_options(config, [*sources.train.values(), *sources.validation.values()])
    unused = [
        f"data.sources.{name}: is not read, as its weight is 0 wherever a stage names it"
        for name, source in config.train_sources.items()
        if not source.weight
    ]
    notes = (*sources.notes, *unused)
    return Data(sources.tokenizer, sources.train, sources.validation, notes)


def _check_chat_options(config: DataConfig, sources: Sequence[Source]) -> None:
    """Raises HymbaError if options of conversations are set, and no source has any."""
    if any(isinstance(each, Tokens) and each.store.has_mask for each in sources):
        return
    for name in ("loss_on", "too_long"):
        if getattr(config, name) != getattr(DataConfig, name):
            raise HymbaError(
                f"data.{name} is of conversations, and no source has any: leave it out, or set "
                "data.format to chat"
            )


def make_rows(
    tokens: TokenStore, packing: Packing, length: int, *, keep_last: bool = False
) -> Rows:
    """The rows of a source of text.

    Args:
      keep_last: whether windows include what is left after the last whole one; packed documents
        always do.
    """
    if packing == "documents":
        return DocumentRows(tokens, length)
    return Windows(tokens, length, keep_last=keep_last)


def _is_text(tokens: Source) -> TypeGuard[Tokens]:
    """Whether the loss is on all tokens, rather than on answers alone."""
    return isinstance(tokens, Tokens) and not tokens.store.has_mask


def _isolated_rows(
    source: str, tokens: Source, packing: str, config: DataConfig
) -> ConversationRows | RecallRows:
    """The rows of a source of conversations, of pairs of them, or of a generated task.

    Args:
      source, packing: what messages call the source, and the name of the field for its packing.
    """
    if getattr(config, packing) != "documents":
        raise HymbaError(
            f"{source}: conversations and generated tasks are isolated documents: set {packing} "
            'to "documents"'
        )
    if isinstance(tokens, RecallSource):
        try:
            return tokens.rows(config.sequence_length)
        except HymbaError as error:
            raise HymbaError(f"{tokens.label}: {error}") from error
    kind = PreferenceRows if tokens.is_preference else ConversationRows
    rows = kind(tokens.store, config.sequence_length, config.too_long)
    if not len(rows):
        raise HymbaError(
            f"{source}: no {kind.item} fit a sequence of {config.sequence_length} tokens: raise "
            "sequence_length"
        )
    return rows


def _text_bytes(tokens: Tokens, tokenizer: Tokenizer) -> int:
    """The UTF-8 bytes of the text of tokens, decoded if they are not known."""
    if tokens.text_bytes is not None:
        return tokens.text_bytes
    total, store = 0, tokens.store
    for start in range(0, store.num_tokens, _DECODED):
        stop = min(start + _DECODED, store.num_tokens)
        borders = [start, *store.document_starts(start + 1, stop).tolist(), stop]
        for first, last in pairwise(borders):
            total += len(tokenizer.decode(store.read(first, last).tolist()).encode())
    return total


_DECODED = 1 << 20  # tokens at once


class _Batches:
    """Some rows of each batch of `batch_size` consecutive examples, a data source for Grain."""

    def __init__(self, examples: Examples, batch_size: int, rows: Sequence[int]) -> None:
        self._examples, self._batch_size, self._rows = examples, batch_size, rows

    def __len__(self) -> int:
        return len(self._examples) // self._batch_size

    def __getitem__(self, index: int) -> Batch:
        first = index * self._batch_size
        return stack_rows([self._examples[first + row] for row in self._rows])


def train_batches(
    examples: Examples, batch_size: int, start: int = 0, rows: Sequence[int] | None = None
) -> Iterator[Batch]:
    """Endless training batches, of which those rows are read that are asked for, or all.

    Args:
      start: how many batches come before the first.
    """
    batches = _Batches(examples, batch_size, range(batch_size) if rows is None else rows)
    # All is mapped: threads would only make the batches wait for one another.
    mapped = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    return iter(grain.MapDataset.source(batches)[start:].to_iter_dataset(mapped))


def validation_batches(
    rows: Rows,
    batch_size: int,
    limit: int | None = None,
    own_rows: Sequence[int] | None = None,
) -> Iterator[Batch]:
    """The rows in order, `batch_size` a batch, the same at every call.

    Behind the last one is padding, so that all batches have one shape. With a `limit` below the
    rows that there are, that many are read, spread evenly, whatever the batch size.

    Args:
      own_rows: of each batch the rows that are asked for; all if absent.
    """
    own_rows = range(batch_size) if own_rows is None else own_rows
    chosen = np.arange(len(rows))
    if limit is not None and limit < len(rows):
        chosen = np.arange(limit) * len(rows) // limit
    for start in range(0, len(chosen), batch_size):
        indices = chosen[start : start + batch_size].tolist()
        padding = [_padding(rows[indices[0]])] if len(indices) < batch_size else []
        yield stack_rows(
            [rows[indices[row]] if row < len(indices) else padding[0] for row in own_rows]
        )


def _padding(row: Batch) -> Batch:
    """A row like another, without targets."""
    zeros: Batch = jax.tree.map(np.zeros_like, row)
    return zeros._replace(targets=np.full_like(row.targets, IGNORED_TARGET))
