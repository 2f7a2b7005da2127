"""`manifest.json`: what a tokenized corpus is, written when all of it is there.

Its bytes depend on the corpus and the options alone, so a digest of it tells two corpora apart.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hymba_jax.errors import HymbaError
from hymba_jax.files import read_json, replace_text

MANIFEST = "manifest.json"
TRAIN, VALIDATION = SIDES = ("train", "validation")
"""What a shard is for, and what its name begins with."""

_VERSION = 1


@dataclass(frozen=True)
class ShardInfo:
    """A shard: `NAME.bin` and `NAME.idx` in Megatron's format, and `NAME.bin.crc`.

    One of conversations has a mask, too: `NAME.mask`, and `NAME.mask.crc`.

    Attributes:
      name: theirs.
      documents, tokens: how many it holds, the tokens before and after each document included.
      text_bytes: UTF-8 bytes of the documents.
      index_bytes, index_crc32: size and CRC-32 of `NAME.idx`.
      blocks_crc32: CRC-32 of `NAME.bin.crc`.
      mask_crc32: CRC-32 of `NAME.mask.crc`, if there is a mask.
    """

    name: str
    documents: int
    tokens: int
    text_bytes: int
    index_bytes: int
    index_crc32: int
    blocks_crc32: int
    mask_crc32: int | None = None

    @property
    def files(self) -> tuple[str, ...]:
        """The names of its files."""
        suffixes = [".bin", ".idx", ".bin.crc"]
        suffixes += [] if self.mask_crc32 is None else [".mask", ".mask.crc"]
        return tuple(f"{self.name}{suffix}" for suffix in suffixes)


@dataclass(frozen=True)
class Side:
    """The shards for training or for validation, in order, and what they hold in all."""

    documents: int
    tokens: int
    text_bytes: int
    shards: tuple[ShardInfo, ...]

    @classmethod
    def of(cls, shards: Iterable[ShardInfo]) -> "Side":
        """The side that has these shards."""
        shards = tuple(shards)
        return cls(
            documents=sum(shard.documents for shard in shards),
            tokens=sum(shard.tokens for shard in shards),
            text_bytes=sum(shard.text_bytes for shard in shards),
            shards=shards,
        )


@dataclass(frozen=True)
class Source:
    """What was tokenized: a path as it was given, its files, and their bytes as they are stored."""

    path: str
    files: int
    bytes: int


@dataclass(frozen=True)
class TokenizerInfo:
    """The tokenizer, which lies beside, and the type that its ids are stored as."""

    fingerprint: str
    vocab_size: int
    dtype: str
    bos_id: int | None
    eos_id: int


@dataclass(frozen=True)
class Manifest:
    """A tokenized corpus.

    Attributes:
      options: how its documents were read and split, by name.
      skipped: how many records were: bad and empty ones, and documents that are held out elsewhere.
    """

    sources: tuple[Source, ...]
    options: Mapping[str, str | float]
    tokenizer: TokenizerInfo
    skipped: int
    train: Side
    validation: Side

    @property
    def format(self) -> str:
        """What the documents are, as `data.format`."""
        return str(self.options.get("format", "text"))

    @classmethod
    def read(cls, path: Path) -> "Manifest":
        """The manifest in a file. Raises HymbaError where it is none."""
        values = read_json(path)
        version = values.pop("version", None)
        if version != _VERSION:
            raise HymbaError(
                f"{path}: version {version!r} of the format, only {_VERSION} is read: tokenize the "
                "corpus again"
            )
        try:
            return cls(
                sources=tuple(Source(**source) for source in values.pop("sources")),
                tokenizer=TokenizerInfo(**values.pop("tokenizer")),
                train=_side(values.pop(TRAIN)),
                validation=_side(values.pop(VALIDATION)),
                **values,
            )
        except (AttributeError, KeyError, TypeError) as error:
            raise HymbaError(
                f"{path}: no manifest of a tokenized corpus ({error}): tokenize the corpus again"
            ) from error

    def write(self, path: Path) -> None:
        """Writes the file whole or not at all."""
        replace_text(path, json.dumps({"version": _VERSION, **asdict(self)}, indent=1) + "\n")


def _side(values: dict[str, Any]) -> Side:
    return Side(**values | {"shards": tuple(ShardInfo(**shard) for shard in values["shards"])})
