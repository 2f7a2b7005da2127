"""Documents from JSON: an object a line, one object, or one array of objects."""

import codecs
import json
import re
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

from hymba_jax.data import records
from hymba_jax.data.records import BrokenFile, Content, Document, Problem, decode, documents, peek
from hymba_jax.files import parse_json

_JSON_SPACE = re.compile(r"[ \t\n\r]*")
_UNFINISHED_STRING = re.compile(r'"(?:[^"\\]++|\\.)*+\\?\Z', re.DOTALL)


def read_json(blocks: Iterator[bytes], name: str, content: Content) -> Iterator[Document | Problem]:
    """A `.json` file: an array or an object of several lines, else JSON lines."""
    head, blocks = peek(blocks)
    start = head.removeprefix(codecs.BOM_UTF8).lstrip()
    if start.startswith(b"["):
        yield from _read_array(blocks, name, content)
    elif start.startswith(b"{") and _ends_early(start.partition(b"\n")[0]):
        yield from _record(f"{name}:1", content, _whole(blocks))
    else:
        yield from read_json_lines(blocks, name, content)


def _ends_early(line: bytes) -> bool:
    """Whether the line is the beginning of a JSON value that goes on in the next one."""
    text = line.decode(errors="replace").rstrip()
    try:
        parse_json(text)
    except json.JSONDecodeError as error:
        return error.pos >= len(text)
    except ValueError:
        return False
    return False


def _whole(blocks: Iterable[bytes]) -> bytes | None:
    """All blocks in one; None if that is too large for a record."""
    content, size = [], 0
    for block in blocks:
        content.append(block)
        size += len(block)
        if size > records.LARGEST_RECORD:
            return None
    return b"".join(content)


def read_json_lines(
    blocks: Iterator[bytes], name: str, content: Content
) -> Iterator[Document | Problem]:
    """A `.jsonl` file."""
    for number, line in enumerate(_lines(blocks), start=1):
        if line is None or (line and not line.isspace()):
            yield from _record(f"{name}:{number}", content, line)


def _lines(blocks: Iterable[bytes]) -> Iterator[bytes | None]:
    """The lines without their ends; None for one that is too large for a record."""
    parts: list[bytes] = []
    size = 0
    for block in chain(blocks, [b"\n"]):
        for index, part in enumerate(block.split(b"\n")):
            if index:  # the line before has ended
                yield b"".join(parts) if size <= records.LARGEST_RECORD else None
                parts, size = [], 0
            size += len(part)
            if size <= records.LARGEST_RECORD:
                parts.append(part)
            else:
                parts.clear()


def _record(name: str, content: Content, line: bytes | None) -> Iterator[Document | Problem]:
    """The document in a JSON object; no line means that it was too large."""
    try:
        if line is None:
            raise ValueError(records.TOO_LARGE)
        document = content.of_json(_parse(line))
    except ValueError as error:
        yield Problem(name, str(error))
    else:
        yield from documents(name, document)


def _parse(line: bytes) -> Any:
    """The JSON value. Raises ValueError saying what is wrong and what to do."""
    try:
        return parse_json(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 text (byte {error.start}): convert the file") from error
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, " if error.lineno > 1 else ""
        raise ValueError(
            f"broken JSON ({error.msg}, {where}column {error.colno}): fix or remove it"
        ) from error
    except ValueError as error:
        raise ValueError(f"unreadable JSON ({error}): fix or remove it") from error


def _read_array(
    blocks: Iterator[bytes], name: str, content: Content
) -> Iterator[Document | Problem]:
    for number, value in enumerate(_elements(decode(blocks)), start=1):
        element = f"{name}:element {number}"
        try:
            document = content.of_json(value)
        except ValueError as error:
            yield Problem(element, str(error))
        else:
            yield from documents(element, document)


def _elements(texts: Iterator[str]) -> Iterator[Any]:
    """The elements of a JSON array, parsed one by one."""
    buffer = next(texts)
    start, number, closed = buffer.index("[") + 1, 1, False
    while not closed:
        start = _after_space(buffer, start)
        if number == 1 and buffer.startswith("]", start):  # an empty array
            start += 1
            break
        try:
            value, start, closed = _element(buffer, start)
        except ValueError as error:
            rest = buffer[start:]
            buffer, start = _extended(rest, texts) if _may_end_early(error) else rest, 0
            if len(buffer) == len(rest):
                reason = getattr(error, "msg", error)
                raise BrokenFile(
                    f"broken JSON ({reason}, in element {number} of the array): fix it"
                ) from error
            if len(rest) > records.LARGEST_RECORD:
                raise BrokenFile(f"element {number} is {records.TOO_LARGE}") from error
        else:
            yield value
            number += 1
    if buffer[start:].strip() or any(map(str.strip, texts)):
        raise BrokenFile("more text after the end of the JSON array: remove it")


def _element(buffer: str, start: int) -> tuple[Any, int, bool]:
    """The element from `start`, where the next one begins, and whether there is none."""
    try:
        value, end = json.JSONDecoder().raw_decode(buffer, start)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    end = _after_space(buffer, end)
    if not buffer.startswith((",", "]"), end):
        raise json.JSONDecodeError("Expecting ',' delimiter", buffer, end)
    return value, end + 1, buffer[end] == "]"


def _after_space(text: str, start: int) -> int:
    found = _JSON_SPACE.match(text, start)
    return found.end() if found else start


def _extended(rest: str, texts: Iterator[str]) -> str:
    """At least twice as much text, if there is so much: so parsing again takes linear time."""
    parts, size = [rest], 0
    for text in texts:
        parts.append(text)
        size += len(text)
        if size >= len(rest):
            break
    return "".join(parts)


def _may_end_early(error: ValueError) -> bool:
    """Whether the text that was parsed may only be too short.

    The parser then stops near its end, in a literal or an escape, or where a string begins that
    has no end.
    """
    return isinstance(error, json.JSONDecodeError) and (
        error.pos >= len(error.doc) - len(r"\ud83d\ude00")
        or _UNFINISHED_STRING.match(error.doc, error.pos) is not None
    )
