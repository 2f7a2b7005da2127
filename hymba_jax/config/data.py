"""What to read, how to tokenize it and how long a sequence is."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from hymba_jax.config.field_types import Bounds, bound_problems, shown, type_problems
from hymba_jax.errors import HymbaError

type Packing = Literal["concat", "documents"]

MIN_VOCAB_SIZE = 259
"""Every byte, and the three special tokens."""

MAX_VOCAB_SIZE = 2**20
"""Several times the largest in use; training a tokenizer takes time and memory with its size."""

DATA_BOUNDS = {
    "sequence_length": Bounds(1, 2**23, "no model has so many positions"),
    "validation_fraction": Bounds(
        1 / 256,
        255 / 256,
        "nothing would be left to train on",
        "documents are chosen in steps of 1/256",
    ),
}


@dataclass(frozen=True)
class DataConfig:
    """Where the text comes from and how it becomes sequences.

    Raises HymbaError, naming every bad value at once.
    """

    path: str = ""
    """Directory of text files and/or .jsonl files, one .jsonl file, or what `hymba tokenize` wrote;
    if empty, the sources of Python's standard library."""

    text_field: str = "text"
    """Field of a JSON line that holds the document."""

    tokenizer: str = "bpe:4096"
    """`bytes`, `bpe:SIZE` (trained on the training documents), or the path of a tokenizer.json or
    of a directory that holds one."""

    sequence_length: int = 512
    """Tokens the model sees per sequence."""

    packing: Packing = "concat"
    """Rows are windows of one stream, as in the paper (`concat`), or whole documents, each computed
    as if it were alone (`documents`)."""

    validation_fraction: float = 0.05
    """About this share of the documents, chosen by a hash of their names, is held out for
    validation; `data.sources.is_held_out` has the rule."""

    def __post_init__(self) -> None:
        problems = [*type_problems(self)] or [*self._value_problems()]
        if problems:
            raise HymbaError("data config: " + "; ".join(problems))

    def _value_problems(self) -> Iterator[str]:
        yield from bound_problems(self, DATA_BOUNDS)
        if not self.text_field:
            yield "text_field is empty"
        if not self.tokenizer:
            yield "tokenizer is empty (bytes, bpe:SIZE or the path of a tokenizer.json)"
        if self.tokenizer.startswith("bpe:") and self.bpe_size is None:
            yield (
                f"tokenizer {shown(self.tokenizer)} needs an integer from "
                f"{MIN_VOCAB_SIZE} to {MAX_VOCAB_SIZE} after 'bpe:'"
            )

    @property
    def bpe_size(self) -> int | None:
        """Vocabulary size of a `bpe:SIZE` tokenizer; None for any other, or a bad SIZE."""
        kind, _, size = self.tokenizer.partition(":")
        if kind != "bpe" or not size.isdecimal() or len(size) > len(str(MAX_VOCAB_SIZE)):
            return None
        return int(size) if MIN_VOCAB_SIZE <= int(size) <= MAX_VOCAB_SIZE else None
