"""What is done of tokenizing a corpus, on disk: so that it resumes, on one host or on several.

Files of about 256 MiB together are a unit; a larger file is a unit of its own. Beside the shards,
the directory `units` has

| file                  | content                                                           |
|-----------------------|-------------------------------------------------------------------|
| `corpus.json`         | options and files, that a command which resumes has to share, and |
|                       | hashes of documents that are on a side of their own               |
| `UUUUU.json`          | a unit's shards that are there, and whether these are all         |
| `UUUUU.skipped.jsonl` | its records that were skipped, if there are any                   |
"""

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from hymba_jax.data.listing import File
from hymba_jax.data.manifest import SIDES, ShardInfo
from hymba_jax.errors import HymbaError
from hymba_jax.files import read_json, replace_text

UNITS = "units"
UNIT_BYTES = 1 << 28
"""Bytes of files, as they are stored, after which a unit is full."""

SHARD_TOKENS = 1 << 28
"""Tokens after which the shards of a unit are closed, at the end of a document."""

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")

_CORPUS = "corpus.json"


@dataclass
class UnitRecord:
    """What is done of a unit.

    Attributes:
      corpus: the digest of what is tokenized, and how.
      shards: those that are there, by side.
      documents: how many of the unit, from the first one on, they hold.
      skipped: how many of its records were; known at the end.
      done: whether the shards hold all of its documents.
    """

    corpus: str
    shards: dict[str, list[ShardInfo]] = field(default_factory=lambda: {side: [] for side in SIDES})
    documents: int = 0
    skipped: int = 0
    done: bool = False

    @classmethod
    def read(cls, path: Path, corpus: str) -> "UnitRecord":
        """The record in a file, or that of a unit of which nothing is done.

        Raises:
          HymbaError: it is of another corpus.
        """
        if not path.exists():
            return cls(corpus)
        values = read_json(path)
        shards = {side: [ShardInfo(**shard) for shard in values["shards"][side]] for side in SIDES}
        record = cls(**values | {"shards": shards})
        if record.corpus != corpus:
            raise HymbaError(
                f"{path}: has shards of other options or another tokenizer: choose another output"
            )
        return record

    def write(self, path: Path) -> None:
        """Writes the file whole or not at all."""
        replace_text(path, json.dumps(asdict(self), indent=1) + "\n")


def record_path(directory: Path, unit: int) -> Path:
    """Where the record of a unit is."""
    return directory / UNITS / f"{unit:05}.json"


def make_units(files: Sequence[File]) -> list[tuple[File, ...]]:
    """The files in groups of about UNIT_BYTES, in order."""
    units: list[list[File]] = []
    size = UNIT_BYTES
    for file in files:
        if size + (file.size or 0) > UNIT_BYTES:
            units.append([])
            size = 0
        units[-1].append(file)
        size += file.size or 0
    return [tuple(unit) for unit in units]


def corpus_digest(directory: Path, tokenizer: str) -> str:
    """A digest of the options and files in a directory, and of a tokenizer's fingerprint."""
    content = (directory / UNITS / _CORPUS).read_bytes()
    return hashlib.blake2b(content + tokenizer.encode(), digest_size=16).hexdigest()


def begin(
    directory: Path,
    options: Mapping[str, Any],
    files: Sequence[File],
    exceptions: Collection[int] = (),
) -> None:
    """Records what is tokenized, or compares it with what was recorded.

    Other options or files replace what was recorded while nothing is there that took work.

    Args:
      exceptions: `Corpus.exceptions`, where other corpora have to know them.

    Raises:
      HymbaError: the directory has shards of other options or files, or holds something else.
    """
    path = directory / UNITS / _CORPUS
    recorded = {**_corpus(options, files), "exceptions": sorted(exceptions)}
    content = json.dumps(recorded) + "\n"
    foreign = [entry.name for entry in directory.iterdir() if _is_foreign(entry)]
    if not path.exists():  # nor was it, while other parts may have added what looks foreign
        if foreign:
            raise HymbaError(
                f"{directory}: holds {min(foreign)}, which is not of `hymba tokenize`: choose an "
                "empty or a new --output"
            )
        path.parent.mkdir(exist_ok=True)
        replace_text(path, content)
    if changed := difference(directory, options, files):
        if has_results(directory):
            raise HymbaError(
                f"{directory}: was begun with {changed}: give the same again, or another --output"
            )
        for name in TOKENIZER_FILES:
            (directory / name).unlink(missing_ok=True)
        replace_text(path, content)


def has_results(directory: Path) -> bool:
    """Whether anything is there that took work: a shard, or a tokenizer that was trained."""
    units = directory / UNITS
    name = read_json(units / _CORPUS)["options"].get("tokenizer", "")
    is_trained = name.startswith("bpe:") and (directory / TOKENIZER_FILES[0]).exists()
    return is_trained or any(units.glob("*[0-9].json"))


def difference(directory: Path, options: Mapping[str, Any], files: Sequence[File]) -> str:
    """How what was recorded differs, in words; empty if it does not, or nothing was recorded."""
    path = directory / UNITS / _CORPUS
    return _difference(read_json(path), _corpus(options, files)) if path.exists() else ""


def moved_difference(directory: Path, files: Sequence[File]) -> str:
    """How files at another path than the recorded one differ by name or size, in words.

    Empty if they do not: a corpus may move, which changes the times of its files.
    """
    recorded = read_json(directory / UNITS / _CORPUS)
    old = {"options": {}, "files": [[name, size] for name, size, *_ in recorded["files"]]}
    new = {"options": {}, "files": [[file.name, file.size] for file in files]}
    return _difference(old, new)


def recorded_path(directory: Path) -> str:
    """The path of what is tokenized, as it was given."""
    return str(read_json(directory / UNITS / _CORPUS)["options"]["data.path"])


def recorded_exceptions(directory: Path) -> frozenset[int]:
    """The hashes that `begin` was given."""
    return frozenset(read_json(directory / UNITS / _CORPUS)["exceptions"])


def _corpus(options: Mapping[str, Any], files: Sequence[File]) -> dict[str, Any]:
    """What is recorded of a corpus."""
    # With other limits the shards would be others.
    limits = {"unit bytes": UNIT_BYTES, "shard tokens": SHARD_TOKENS}
    return {
        "options": {**options, **limits},
        "files": [[file.name, file.size, file.version] for file in files],
    }


def count_done(directory: Path) -> tuple[int, int] | None:
    """How many units of a directory are done, and of how many; None if it has none."""
    path = directory / UNITS / _CORPUS
    if not path.exists():
        return None
    units = make_units([File(name, name, size) for name, size, *_ in read_json(path)["files"]])
    records = (record_path(directory, unit) for unit in range(len(units)))
    return sum(path.exists() and read_json(path)["done"] for path in records), len(units)


def _is_foreign(path: Path) -> bool:
    """Whether something is not there before anything is recorded."""
    return path.name != UNITS and path.suffix != ".lock"


def _difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What differs, in words; empty if nothing does."""
    names = chain(before["options"], now["options"])
    for name in dict.fromkeys(names):
        old, new = before["options"].get(name), now["options"].get(name)
        if old != new:
            return f"{name} {old!r}, which is {new!r} now"
    old_files, new_files = (
        {name: tuple(rest) for name, *rest in each["files"]} for each in (before, now)
    )
    if old_files == new_files:
        return ""
    changed = {name for name, _ in old_files.items() ^ new_files.items()}
    first = min(changed)
    if first not in new_files:
        what = "is gone"
    elif first not in old_files:
        what = "is new"
    elif new_files[first][0] != old_files[first][0]:
        what = f"has {new_files[first][0]} bytes instead of {old_files[first][0]}"
    else:
        what = "was modified"
    return f"other files: {first} {what}" + f" (and {len(changed) - 1} more)" * (len(changed) > 1)
