"""Documents, read in a fixed order and split by name into training and validation.

The split depends on nothing but each document's name, so a document stays on its side when others
are added.
"""

import hashlib
import json
import sysconfig
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hymba_jax.data.config import DataConfig
from hymba_jax.errors import HymbaError
from hymba_jax.files import resolve_path

_NOT_LIBRARY = {"test", "idlelib", "site-packages", "dist-packages"}


@dataclass(frozen=True)
class Document:
    """A text and its name: a path inside the corpus, with `:line` for JSON lines."""

    name: str
    text: str


@dataclass(frozen=True)
class Corpus:
    """Documents on either side of the split, neither side empty."""

    train: list[Document]
    validation: list[Document]


def load_documents(config: DataConfig) -> Corpus:
    """Reads and splits the corpus of `config`; documents without text are passed over.

    Raises HymbaError, naming the file and line, where something cannot be read, and where there
    is no text or one side of the split would be empty.
    """
    if config.path:
        path = resolve_path(config.path)
        documents = list(_read(path, config.text_field))
        split_names = [document.name for document in documents]
    else:
        path = Path(sysconfig.get_path("stdlib"))
        documents = list(_read_standard_library(path))
        # By file name alone: the split for which gzip's and xz's bits per byte are known.
        split_names = [document.name.rpartition("/")[2] for document in documents]
    if not documents:
        raise HymbaError(f"{path}: no text found: give a directory of text files or a .jsonl file")

    held_out = [is_held_out(name, config.held_out_one_in) for name in split_names]
    if all(held_out) or not any(held_out):
        raise HymbaError(_empty_side(path, split_names, config.held_out_one_in))
    pairs = list(zip(documents, held_out, strict=True))
    return Corpus(
        train=[document for document, held in pairs if not held],
        validation=[document for document, held in pairs if held],
    )


def is_held_out(name: str, one_in: int) -> bool:
    """Whether the document called `name` belongs to validation: about one in `one_in` does."""
    return hashlib.sha1(name.encode(errors="surrogateescape")).digest()[0] % one_in == 0


def _empty_side(path: Path, names: list[str], one_in: int) -> str:
    side = "training" if all(is_held_out(name, one_in) for name in names) else "validation"
    message = f"{path}: held_out_one_in {one_in} leaves no {side} document of {len(names)}: "
    for other in sorted(range(2, 129), key=lambda other: abs(other - one_in)):
        count = sum(is_held_out(name, other) for name in names)
        if 0 < count < len(names):
            return message + f"set held_out_one_in to {other} (it holds out {count})"
    return message + "add documents, or split the text into more of them"


def _read_standard_library(root: Path) -> Iterator[Document]:
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if name.parts[0] in _NOT_LIBRARY:
            continue
        try:
            with tokenize.open(path) as file:  # in the encoding that the source declares
                text = file.read()
        except (SyntaxError, UnicodeDecodeError):
            continue  # a handful of the library's own test inputs are broken on purpose
        if text:
            yield Document(name.as_posix(), text)


def _read(path: Path, text_field: str) -> Iterator[Document]:
    if path.is_dir():
        for file in sorted(path.rglob("*")):
            name = file.relative_to(path)
            if file.is_file() and not any(part.startswith(".") for part in name.parts):
                yield from _read_file(file, name.as_posix(), text_field)
    elif not path.exists():
        raise HymbaError(f"{path}: no such file or directory: check the data path")
    elif path.suffix == ".jsonl":
        yield from _read_file(path, path.name, text_field)
    else:
        raise HymbaError(f"{path}: neither a directory nor a .jsonl file: give one of these")


def _read_file(path: Path, name: str, text_field: str) -> Iterator[Document]:
    try:
        if path.suffix == ".jsonl":
            yield from _read_json_lines(path, name, text_field)
        else:
            yield from _read_text(path, name)
    except OSError as error:
        raise HymbaError(f"{path}: cannot be read ({error.strerror}): check the file") from error


def _read_text(path: Path, name: str) -> Iterator[Document]:
    content = path.read_bytes()
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
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                try:
                    text = _text_of_line(line, text_field)
                except ValueError as error:
                    raise HymbaError(f"{path}, line {number}: {error}") from error
                if text:
                    yield Document(f"{name}:{number}", text)


def _text_of_line(line: bytes, text_field: str) -> str:
    """The document in one JSON line. Raises ValueError saying what is wrong and what to do."""
    try:
        value = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 text (byte {error.start}): convert the file") from error
    except json.JSONDecodeError as error:
        raise ValueError(
            f"broken JSON ({error.msg}, column {error.colno}): mend or remove the line"
        ) from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"unreadable JSON ({error}): mend or remove the line") from error
    if not isinstance(value, dict):
        raise ValueError('not a JSON object: write {"' + text_field + '": "..."}')
    if text_field not in value:
        fields = ", ".join(map(repr, value)) or "none"
        raise ValueError(f"no field {text_field!r} (it has: {fields}): set text_field")
    text = value[text_field]
    if not isinstance(text, str):
        raise ValueError(f"field {text_field!r} is not a string: mend the line or set text_field")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError(
            f"field {text_field!r} holds half a surrogate pair, which is no text: mend the line"
        )
    return text
