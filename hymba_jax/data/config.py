"""What to read, how to tokenize it and how long a sequence is."""

from dataclasses import dataclass

from hymba_jax.errors import HymbaError

SMALLEST_VOCABULARY = 259
"""Every byte, and the three special tokens."""


@dataclass(frozen=True)
class DataConfig:
    """Where the text comes from and how it becomes sequences.

    Raises HymbaError, naming every bad value at once.
    """

    path: str = ""
    """Directory of text files and/or .jsonl files, or one .jsonl file; nothing: the running
    Python's standard library sources."""

    text_field: str = "text"
    """Field of a JSON line that holds the document."""

    tokenizer: str = "bpe:4096"
    """`bytes`, `bpe:SIZE` (trained on the training documents), or the path of a tokenizer.json or
    of a directory that holds one."""

    sequence_length: int = 512
    """Tokens the model sees per sequence."""

    held_out_one_in: int = 20
    """About one document in this many, chosen by a hash of its name, is held out for validation."""

    def __post_init__(self) -> None:
        problems = []
        if not self.text_field:
            problems.append("text_field is empty")
        if not self.tokenizer:
            problems.append("tokenizer is empty (bytes, bpe:SIZE or the path of a tokenizer.json)")
        if self.tokenizer.startswith("bpe:") and self.bpe_size is None:
            problems.append(
                f"tokenizer {self.tokenizer!r} needs a whole number of at least "
                f"{SMALLEST_VOCABULARY} after 'bpe:'"
            )
        if self.sequence_length < 1:
            problems.append(f"sequence_length is {self.sequence_length}, it must be at least 1")
        if not 2 <= self.held_out_one_in <= 128:
            problems.append(
                f"held_out_one_in is {self.held_out_one_in}, it must be between 2 and 128"
            )
        if problems:
            raise HymbaError("data config: " + "; ".join(problems))

    @property
    def bpe_size(self) -> int | None:
        """Vocabulary size of a `bpe:SIZE` tokenizer; None for any other, or a bad SIZE."""
        kind, _, size = self.tokenizer.partition(":")
        if kind == "bpe" and size.isdecimal() and int(size) >= SMALLEST_VOCABULARY:
            return int(size)
        return None
