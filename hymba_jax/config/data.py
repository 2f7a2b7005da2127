"""What to read, how to tokenize it and how long a sequence is."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

from hymba_jax.config.field_types import Bounds, bound_problems, shown, type_problems
from hymba_jax.errors import HymbaError

type Packing = Literal["concat", "documents"]
type OnBadRecord = Literal["stop", "skip"]
type Format = Literal["text", "chat", "preference"]
type LossOn = Literal["all", "last"]
type TooLong = Literal["truncate", "drop"]
type TokenDtype = Literal["", "uint16", "uint32"]

RecallName = Literal["mqar", "selective_copying", "induction"]
"""The tasks of recall that are generated (`data/recall.py`)."""

MIN_VOCAB_SIZE = 259
"""Every byte, and the three special tokens."""

MAX_VOCAB_SIZE = 2**20
"""Several times the largest in use; training a tokenizer takes time and memory with its size."""

DATA_BOUNDS = {
    "sequence_length": Bounds(1, 2**23, "no model has so many positions"),
    "validation_fraction": Bounds(
        1e-9, 255 / 256, "nothing would be left to train on", "nothing would be held out"
    ),
}
_LIBRARY_BOUNDS = DATA_BOUNDS | {
    "validation_fraction": DATA_BOUNDS["validation_fraction"]._replace(
        at_least=1 / 256, below="files of the standard library are chosen in steps of 1/256"
    )
}

_WEIGHT = Bounds(0, 1e9, "no share needs it")


@dataclass(frozen=True)
class SourceConfig:
    """A source: text, or tokens of one tokenizer.

    Attributes:
      path: a file, a directory or a glob of text, JSON or Parquet files, compressed or not, local
        or a URL such as gs://bucket/directory; what `hymba tokenize` wrote, local, gs:// or s3://,
        of which every host makes a copy in $XDG_CACHE_HOME/hymba_jax; local tokens in Megatron's
        format (`NAME.bin` with `NAME.idx`), in a flat `.bin` or in a `.npy`; or a generated task,
        TASK:PAIRS:LENGTH or TASK:PAIRS:LENGTH:VOCAB_SIZE, such as mqar:8:64, whatever file has that
        name: TASK is mqar, selective_copying or induction, and the VOCAB_SIZE 64 if there is none.
      text_field: of text, as `data.text_field`, which it is if this is empty.
      token_dtype: of a flat `.bin`.
      format: of text, as `data.format`, which it is if this is empty.
    """

    path: str = ""
    text_field: str = ""
    token_dtype: TokenDtype = ""
    format: Literal["", "text", "chat", "preference"] = ""


@dataclass(frozen=True)
class WeightedSourceConfig(SourceConfig):
    """A source of training, which has `weight` over the sum of all weights of the sequences."""

    weight: float = 1.0


@dataclass(frozen=True)
class DataConfig:
    """Where the text comes from and how it becomes sequences.

    Raises HymbaError, naming every bad value at once.
    """

    path: str = ""
    """The only source, as the path of a `[data.sources.NAME]`; if empty, and there are no such
    tables, the sources of Python's standard library."""

    format: Format = "text"
    """Whether records are text; conversations (`chat`): `messages`, `conversations`, or `prompt`
    and `completion`, with the loss on answers alone; or pairs of them (`preference`): `prompt`,
    `chosen` and `rejected`, for objective `dpo`. The last two, and generated tasks, need
    `documents` for packing."""

    loss_on: LossOn = "all"
    """Whether the loss of a conversation is on all of its answers, or on the last one. Those before
    the prompt of a pair are never in it."""

    too_long: TooLong = "truncate"
    """Whether conversations, or pairs of them, that are longer than a sequence lose their end (and
    are left out if no answer remains), or are left out (`drop`)."""

    text_field: str = "text"
    """Field of a JSON object, or column of Parquet, that holds the document."""

    on_bad_record: OnBadRecord = "stop"
    """Whether a bad record of text is an error (`stop`) or left out and listed (`skip`)."""

    tokenizer: str = "bpe:4096"
    """`bytes`, `bpe:SIZE` (trained on the training documents), or the path of a tokenizer.json or
    of a directory that holds one."""

    chat_template: str = ""
    """File of a chat template in Jinja, in place of the tokenizer's own; the run keeps it."""

    sequence_length: int = 512
    """Tokens the model sees per sequence."""

    packing: Packing = "concat"
    """Rows are windows of one stream, as in the paper (`concat`), or whole documents, each computed
    as if it were alone (`documents`)."""

    validation_packing: Packing = "concat"
    """The same for validation, where `documents` scores each document from its own start."""

    validation_fraction: float = 0.05
    """About this share of the documents of text, chosen by a hash of each, is held out for
    validation, unless there are sources for validation."""

    sources: Mapping[str, WeightedSourceConfig] = field(default_factory=dict)
    """Sources of training by name: tables `[data.sources.NAME]` in place of `path`."""

    validation: Mapping[str, SourceConfig] = field(default_factory=dict)
    """Sources of validation by name: tables `[data.validation.NAME]` in place of
    `validation_fraction`. Of text, documents that are also there are not trained on; what is
    tokenized already is taken whole, and not searched (see `hymba tokenize --data.exclude`). A
    generated task is sampled from another seed here than in training."""

    def __post_init__(self) -> None:
        problems = [*type_problems(self)] or [*self._value_problems()]
        if problems:
            raise HymbaError("data config: " + "; ".join(problems))

    def _value_problems(self) -> Iterator[str]:
        is_library = not (self.path or self.sources)
        yield from bound_problems(self, _LIBRARY_BOUNDS if is_library else DATA_BOUNDS)
        if not self.text_field:
            yield "text_field is empty"
        if not self.tokenizer:
            yield "tokenizer is empty (bytes, bpe:SIZE or the path of a tokenizer.json)"
        if self.tokenizer.startswith("bpe:") and self.bpe_size is None:
            yield (
                f"tokenizer {shown(self.tokenizer)} needs an integer from "
                f"{MIN_VOCAB_SIZE} to {MAX_VOCAB_SIZE} after 'bpe:'"
            )
        yield from self._source_problems()

    def _source_problems(self) -> Iterator[str]:
        every = [*self.train_sources.values(), *self.validation.values()]
        for table in ("sources", "validation"):
            for name, source in getattr(self, table).items():
                if not source.path:
                    yield f"{table}.{name}.path is empty"
                if is_generated(source.path):
                    yield from (
                        f"{table}.{name}.{option} has no effect on {source.path}, which is "
                        "generated: leave it out"
                        for option in ("text_field", "token_dtype", "format")
                        if getattr(source, option)
                    )
                elif source.text_field and self.has_answers(source):
                    yield (
                        f"{table}.{name}.text_field has no effect on format "
                        f"{self.format_of(source)}: leave it out"
                    )
        if self.text_field != DataConfig.text_field and all(map(self.has_answers, every)):
            yield "text_field has no effect, as no source is text: leave it out"
        if self.format != "text" and all(is_generated(source.path) for source in every):
            yield "format has no effect, as all sources are generated: leave it out"
        for name, source in self.sources.items():
            weights = bound_problems(source, {"weight": _WEIGHT})
            yield from (f"sources.{name}.{problem}" for problem in weights)
        if self.sources and not any(source.weight for source in self.sources.values()):
            yield "no source has a weight above 0"
        if self.sources and self.path:
            yield f"path is {shown(self.path)}, but there are sources: make it one of them"
        if self.format != "text" and not (self.sources or self.path):
            yield (
                f"format is {self.format}, but there is no path: the standard library has no "
                "conversations"
            )

    def packing_problems(self) -> Iterator[str]:
        """What is wrong with how conversations and generated tasks are packed, as far as sources
        are said to be such.

        Not with the config itself: each stage may have a packing of its own.
        """
        train = [source for source in self.train_sources.values() if source.weight]
        held_out = [*self.validation.values()] or [
            source for source in train if not is_generated(source.path)
        ]
        for name, sources in (("packing", train), ("validation_packing", held_out)):
            if getattr(self, name) != "documents" and any(map(self.has_answers, sources)):
                yield (
                    "conversations and generated tasks are isolated documents: "
                    f'set data.{name} to "documents"'
                )

    def format_of(self, source: SourceConfig) -> Format:
        """What the records of a source are said to be."""
        return source.format or self.format

    def has_answers(self, source: SourceConfig) -> bool:
        """Whether the loss is on answers alone: a source is said to be of conversations, or of
        pairs of them, or it is generated."""
        return is_generated(source.path) or self.format_of(source) != "text"

    @property
    def train_sources(self) -> Mapping[str, WeightedSourceConfig]:
        """The sources of training, of which `path` is one that is called `corpus`."""
        return self.sources or {"corpus": WeightedSourceConfig(self.path)}

    @property
    def bpe_size(self) -> int | None:
        """Vocabulary size of a `bpe:SIZE` tokenizer; None for any other, or a bad SIZE."""
        kind, _, size = self.tokenizer.partition(":")
        if kind != "bpe" or not size.isdecimal() or len(size) > len(str(MAX_VOCAB_SIZE)):
            return None
        return int(size) if MIN_VOCAB_SIZE <= int(size) <= MAX_VOCAB_SIZE else None


def is_generated(path: str) -> bool:
    """Whether the path of a source is a task of recall, rather than a place."""
    return path.startswith(tuple(f"{name}:" for name in get_args(RecallName)))
