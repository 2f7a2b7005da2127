"""Documents, read in a fixed order and split by name into training and validation.

The split depends on nothing but each document's name, so a document stays on its side when others
are added.
"""

import hashlib
import json
import os
import sysconfig
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from hymba_jax.config.data import DataConfig
from hymba_jax.data.documents import read_standard_library
from hymba_jax.data.records import Document
from hymba_jax.errors import HymbaError
from hymba_jax.files import file_kind, open_regular, parse_json, resolve_location, resolve_path

# What is read at once, as bytes: a text file, or a line of a .jsonl file.
_LARGEST_DOCUMENT = 1 << 30
_TOO_LARGE = "longer than 1 GiB, the most that one document may be: split it into several"
# What makes a directory that of a run, here or in another place.
_RUN_FILES = ("config.toml", "tokenizer.json", "checkpoints")


@dataclass(frozen=True)
class Corpus:
    """Documents on either side of the split, neither side empty.

    Attributes:
      left_out: what below `data.path` is no document, and how often, such as `hidden entries: 2`;
        empty if nothing was left out.
    """

    train: list[Document]
    validation: list[Document]
    left_out: str = ""


def load_documents(config: DataConfig, output: str | None = None) -> Corpus:
    """Reads and splits the corpus of `config`.

    Run directories in it are no part of it: neither `output`, whether it is there yet or not, nor
    others. Nor are devices and the like, links to directories, hidden files and directories, and
    documents without text.

    Args:
      output: the run directory of the run that reads.

    Raises:
      HymbaError: naming the file and line, where something cannot be read, and where there is no
        text or one side of the split would be empty.
    """
    left_out: Counter[str] = Counter()
    if config.path:
        path = resolve_path(config.path)
        documents = list(_read(path, config.text_field, output, left_out))
        split_names = [document.name for document in documents]
    else:
        path = Path(sysconfig.get_path("stdlib"))
        documents = list(read_standard_library())
        # By file name alone: the split for which gzip's and xz's bits per byte are known.
        split_names = [document.name.rpartition("/")[2] for document in documents]
    if not documents:
        raise HymbaError(f"{path}: no text found: give a directory of text files or a .jsonl file")

    held_out = [is_held_out(name, config.validation_fraction) for name in split_names]
    if all(held_out) or not any(held_out):
        raise HymbaError(_empty_side(path, split_names, config.validation_fraction))
    pairs = list(zip(documents, held_out, strict=True))
    return Corpus(
        train=[document for document, held in pairs if not held],
        validation=[document for document, held in pairs if held],
        left_out=", ".join(f"{what}: {count}" for what, count in sorted(left_out.items())),
    )


def is_held_out(name: str, fraction: float) -> bool:
    """Whether the document called `name` belongs to validation: about this fraction of them does.

    With b the first byte of the SHA-1 of the name, it does if an integer lies in
    (fraction (b - 1), fraction b]. For a fraction of 1/n these are the multiples of n.
    """
    byte = hashlib.sha1(name.encode(errors="surrogateescape")).digest()[0]
    exact = Fraction(str(fraction))  # of the decimal that was written: rounding decides nothing
    return byte * exact % 1 < exact


def _empty_side(path: Path, names: list[str], fraction: float) -> str:
    side = "training" if all(is_held_out(name, fraction) for name in names) else "validation"
    message = f"{path}: validation_fraction {fraction} leaves no {side} document of {len(names)}: "
    hundredths = [number / 100 for number in range(1, 100)]
    for other in sorted(hundredths, key=lambda other: abs(other - fraction)):
        count = sum(is_held_out(name, other) for name in names)
        if 0 < count < len(names):
            return message + f"set validation_fraction to {other} (it holds out {count})"
    return message + "add documents, or split the text into more of them"


def _read(
    path: Path, text_field: str, output: str | None, left_out: Counter[str]
) -> Iterator[Document]:
    if path.is_dir():
        if output is not None and resolve_location(output).resolve() == path.resolve():
            raise HymbaError(
                f"{path}: is data.path and output, too: choose an output of its own, which may be "
                "a directory in it"
            )
        for file in sorted(_files(path, output, left_out)):
            name = file.relative_to(path).as_posix()
            documents = list(_read_file(file, name, text_field))
            if not documents:
                left_out["files without text"] += 1
            yield from documents
    elif not path.exists():
        raise HymbaError(f"{path}: no such file or directory: check the data path")
    elif path.suffix == ".jsonl":
        yield from _read_file(path, path.name, text_field)
    else:
        raise HymbaError(f"{path}: neither a directory nor a .jsonl file: give one of these")


def _files(root: Path, output: str | None, left_out: Counter[str]) -> Iterator[Path]:
    """The regular files below a directory, links to such among them."""
    own = None if output is None else resolve_location(output).resolve()
    directories = [root]
    while directories:
        directory = directories.pop()
        try:
            entries = list(os.scandir(directory))
        except OSError as error:
            raise HymbaError(f"{directory}: cannot be read ({error.strerror})") from error
        for entry in entries:
            path = Path(entry.path)
            if entry.name.startswith("."):
                left_out["hidden entries"] += 1
            elif entry.is_dir(follow_symlinks=False):
                if path.resolve() == own or all((path / name).exists() for name in _RUN_FILES):
                    left_out["run directories"] += 1
                else:
                    directories.append(path)
            elif path.is_file():
                yield path
            elif not path.exists():  # a link to nothing, or one that leads back to itself
                left_out["broken links"] += 1
            elif path.is_dir():
                left_out["links to directories"] += 1
            else:
                left_out[f"{file_kind(path.stat().st_mode)}s"] += 1


def _read_file(path: Path, name: str, text_field: str) -> Iterator[Document]:
    try:
        if path.suffix == ".jsonl":
            yield from _read_json_lines(path, name, text_field)
        else:
            yield from _read_text(path, name)
    except OSError as error:
        raise HymbaError(f"{path}: cannot be read ({error.strerror}): check the file") from error


def _read_text(path: Path, name: str) -> Iterator[Document]:
    with open_regular(path) as file:
        if os.fstat(file.fileno()).st_size > _LARGEST_DOCUMENT:
            raise HymbaError(f"{path}: {_TOO_LARGE}")
        content: bytes = file.read()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise HymbaError(
            f"{path}: not UTF-8 text (byte {error.start}): convert it or take it out"
        ) from error
    if "\0" in text:
        raise HymbaError(f"{path}: binary, not text (byte {content.index(0)} is zero): take it out")
    if text:
        yield Document(name, text)


def _read_json_lines(path: Path, name: str, text_field: str) -> Iterator[Document]:
    with open_regular(path) as file:
        lines = iter(lambda: file.readline(_LARGEST_DOCUMENT + 1), b"")
        for number, line in enumerate(lines, start=1):
            if line.strip():
                try:
                    text = _text_of_line(line, text_field)
                except ValueError as error:
                    raise HymbaError(f"{path}, line {number}: {error}") from error
                if text:
                    yield Document(f"{name}:{number}", text)


def _text_of_line(line: bytes, text_field: str) -> str:
    """The document in one JSON line. Raises ValueError saying what is wrong and what to do."""
    if len(line) > _LARGEST_DOCUMENT:
        raise ValueError(_TOO_LARGE)
    try:
        value = parse_json(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 text (byte {error.start}): convert the file") from error
    except json.JSONDecodeError as error:
        raise ValueError(
            f"broken JSON ({error.msg}, column {error.colno}): fix or remove the line"
        ) from error
    except ValueError as error:
        raise ValueError(f"unreadable JSON ({error}): fix or remove the line") from error
    if not isinstance(value, dict):
        raise ValueError('not a JSON object: write {"' + text_field + '": "..."}')
    if text_field not in value:
        fields = ", ".join(map(repr, value)) or "none"
        raise ValueError(f"no field {text_field!r} (it has: {fields}): set text_field")
    text = value[text_field]
    if not isinstance(text, str):
        raise ValueError(f"field {text_field!r} is not a string: fix the line or set text_field")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError(
            f"field {text_field!r} holds half a surrogate pair, which is no text: fix the line"
        )
    return text
