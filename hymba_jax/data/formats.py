"""From the bytes of a file to documents, in bounded memory.

Content decides, where it can: a file is compressed, Parquet or binary by what it begins with. The
suffix, without that of a compression, tells JSON from text. Records are counted from 1, and named

| a file of                                           | record                  |
|-----------------------------------------------------|-------------------------|
| text: any other suffix                              | `notes.txt`             |
| JSON lines: `.jsonl`, `.ndjson`, `.json`            | `corpus.jsonl:LINE`     |
| one JSON object, over several lines: `.json`        | `corpus.json:1`         |
| one JSON array of objects: `.json`                  | `corpus.json:element N` |
| Parquet, whatever its suffix                        | `corpus.parquet:row N`  |
"""

import bz2
import codecs
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from io import BufferedIOBase
from itertools import chain
from typing import Any, NamedTuple

import zstandard

from hymba_jax.errors import HymbaError
from hymba_jax.files import parse_json

# Characters of a piece at most, and so of what is tokenized at once.
_PIECE = 1 << 24
# Of one record, bytes or characters.
_LARGEST_RECORD = 1 << 30
_TOO_LARGE = "longer than 1 GiB, the most that one record may be: split it into several"
# Bytes that are read at once; of compressed data, of which each may become 32 KiB, fewer.
_BLOCK = 1 << 20
_COMPRESSED_BLOCK = 1 << 12
# Rows of Parquet that are in memory at once.
_ROWS = 64
_JSON_SPACE = re.compile(r"[ \t\n\r]*")
_UNFINISHED_STRING = re.compile(r'"(?:[^"\\]++|\\.)*+\\?\Z', re.DOTALL)
_UTF8_BOM = codecs.BOM_UTF8
# Text may begin with these letters, but Thrift, which follows, with nothing that is printed.
_PARQUET = re.compile(rb"PAR1(?![ -~\s])")


@dataclass(frozen=True)
class Document:
    """A text of a corpus, or one piece of a long one.

    Attributes:
      name: that of its record, below the corpus.
      text: not empty; 16 Mi characters at most.
      continues: whether the next document is the next piece of this one. Pieces end at line ends,
        if they have any.
    """

    name: str
    text: str
    continues: bool = False


@dataclass(frozen=True)
class Problem:
    """A record that is no document, or a file that cannot be read on.

    Attributes:
      name: that of the record or the file, below the corpus.
      reason: what is wrong, and what to do.
      whole_file: whether it is a file; documents before the problem remain.
    """

    name: str
    reason: str
    whole_file: bool = False


class BrokenFile(ValueError):
    """What is wrong with a file from here on, and what to do, without its name."""


def read_records(file: BufferedIOBase, name: str, text_field: str) -> Iterator[Document | Problem]:
    """The documents of a file in order, and each bad record in its place.

    Records without text are left out.

    Args:
      file: open at its start; one of Parquet has to be seekable.
      text_field: the field of JSON objects, or column of Parquet, that is the text.

    Raises:
      BrokenFile: the file is not text, or broken from here on.
      HymbaError: it is Parquet, and pyarrow is not installed.
      OSError: it cannot be read.
    """
    head, blocks = _peek(iter(partial(file.read, _BLOCK), b""))
    suffix = _suffix(name)
    if _PARQUET.match(head):
        yield from _read_parquet(file, name, text_field)
        return
    if compression := _find_compression(head):
        head, blocks = _peek(_grouped(_decompress(blocks, compression)))
        if _PARQUET.match(head) or _find_compression(head):
            raise BrokenFile(f"compressed twice: undo the {compression.name} compression")
    _refuse_binary(head)
    if suffix == ".parquet" and head:
        raise BrokenFile("not a Parquet file, in spite of its name: rename it or take it out")
    yield from _READERS.get(suffix, _read_text)(blocks, name, text_field)


def _suffix(name: str) -> str:
    """`.json` and the like, in lower case and without that of a compression."""
    stem = re.sub(r"\.(gz|zst|zstd|xz|bz2)$", "", name.rpartition("/")[2].lower())
    return "".join(stem.rpartition(".")[1:]) if "." in stem else ""


# --- Blocks of bytes ---


def _peek(blocks: Iterator[bytes]) -> tuple[bytes, Iterator[bytes]]:
    """The first block, and all of them."""
    head = next(blocks, b"")
    return head, chain([head], blocks)


def _grouped(blocks: Iterable[bytes]) -> Iterator[bytes]:
    """The same bytes in blocks of at least _BLOCK, but for the last."""
    group, size = [], 0
    try:
        for block in blocks:
            group.append(block)
            size += len(block)
            if size >= _BLOCK:
                yield b"".join(group)
                group, size = [], 0
    except BrokenFile:
        yield b"".join(group)  # what comes before remains
        raise
    yield b"".join(group)


class _Compression(NamedTuple):
    name: str
    magic: bytes  # a regular expression
    start: Callable[[], Any]
    error: type[Exception]


def _start_zstd() -> Any:
    # The largest window, as of `zstd --long=31`, in which large corpora are published.
    return zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()


_COMPRESSIONS = (
    _Compression("gzip", rb"\x1f\x8b\x08", lambda: zlib.decompressobj(31), zlib.error),
    # A frame, or one to skip, with which those begin that several threads have written.
    _Compression(
        "zstd", rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18", _start_zstd, zstandard.ZstdError
    ),
    _Compression("xz", rb"\xfd7zXZ\0", lzma.LZMADecompressor, lzma.LZMAError),
    # With the mark of a block or of the end: "BZh" alone may be text.
    _Compression("bzip2", rb"BZh[1-9](1AY&SY|\x17rE8P\x90)", bz2.BZ2Decompressor, OSError),
)


def _find_compression(head: bytes) -> _Compression | None:
    return next((c for c in _COMPRESSIONS if re.match(c.magic, head)), None)


def _decompress(blocks: Iterable[bytes], compression: _Compression) -> Iterator[bytes]:
    """All members or frames, one after the other."""
    member = None
    for data in _cut(blocks, _COMPRESSED_BLOCK):
        while data:
            if member is None:
                data = data.lstrip(b"\0")  # padding between members, or at the end
                if not data:
                    break
                member = compression.start()
            try:
                content = member.decompress(data)
            except compression.error as error:
                raise BrokenFile(
                    f"corrupt {compression.name} data ({error}): copy it again"
                ) from error
            yield content
            data = b""
            if member.eof:
                data, member = member.unused_data, None
    if member is not None:
        raise BrokenFile(f"truncated {compression.name} data: copy the file again")


def _cut(blocks: Iterable[bytes], size: int) -> Iterator[bytes]:
    for block in blocks:
        for start in range(0, len(block), size):
            yield block[start : start + size]


# What files begin with that are no text: regular expressions, the more special ones first. A text
# may begin with the same letters, but has no zero byte after them.
_BINARY = (
    (rb"%PDF-", "a PDF file"),
    (rb"\x89PNG\r\n\x1a\n", "a PNG image"),
    (rb"\xff\xd8\xff", "a JPEG image"),
    (rb"GIF8[79]a.*\0", "a GIF image"),
    (rb"(II\*\0|MM\0\*)", "a TIFF image"),
    (rb"RIFF....WEBP", "a WebP image"),
    (rb"BM....\0{4}", "a BMP image"),
    (rb"RIFF....WAVE", "a WAV recording"),
    (rb"RIFF....AVI ", "an AVI film"),
    (rb"ID3[\x02-\x04]|\xff[\xfb\xf3\xf2]", "an MP3 recording"),
    (rb"OggS\0", "an Ogg recording"),
    (rb"fLaC\0", "a FLAC recording"),
    (rb"\0\0..ftyp", "an MP4 film"),
    (rb"\x1aE\xdf\xa3", "a Matroska or WebM film"),
    (rb"PK\x03\x04.*(word/|xl/|ppt/|\[Content_Types\])", "an Office document"),
    (rb"PK\x03\x04.*mimetypeapplication/epub", "an EPUB book"),
    (rb"PK\x03\x04.*mimetypeapplication/vnd\.oasis", "an OpenDocument file"),
    (rb"PK\x03\x04.*/data\.pkl", "a PyTorch checkpoint"),
    (rb"PK\x03\x04.*\.npy", "a NumPy archive"),
    (rb"PK\x03\x04.*META-INF/", "a Java archive"),
    (rb"PK(\x03\x04|\x05\x06)", "a ZIP archive"),
    (rb"7z\xbc\xaf\x27\x1c", "a 7z archive"),
    (rb"Rar!\x1a\x07", "a RAR archive"),
    (rb".{257}ustar[\0 ]", "a tar archive"),
    (rb"\x04\x22\x4d\x18", "LZ4 data"),
    (rb"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an old Office document"),
    (rb"\x7fELF", "an ELF program"),
    (rb"MZ.*\0", "a Windows program"),
    (rb"(\xcf\xfa\xed\xfe|\xce\xfa\xed\xfe)", "a macOS program"),
    (rb"\xca\xfe\xba\xbe", "a Java class or macOS program"),
    (rb"\0asm", "a WebAssembly module"),
    (rb"wOF[F2](\0\x01\0\0|OTTO|true)|OTTO\0|\0\x01\0\0\0", "a font"),
    (rb"SQLite format 3\0", "an SQLite database"),
    (rb"\x89HDF\r\n\x1a\n", "an HDF5 file"),
    (rb"\x93NUMPY", "a NumPy array"),
    (rb"\x80[\x02-\x05]", "a Python pickle"),
    (rb".{4}\0{4}\{\"", "a safetensors checkpoint"),
    (rb"GGUF.\0\0\0", "a GGUF checkpoint"),
    (rb"ARROW1\0\0|FEA1.*\0", "an Arrow file"),
    (rb"\xff\xff\xff\xff..\0\0", "an Arrow stream"),
    (rb"Obj\x01", "an Avro file"),
    (rb"ORC.*\0", "an ORC file"),
    (rb"PARE.*\0", "an encrypted Parquet file"),
)
_OTHER_UNICODE = (
    (codecs.BOM_UTF32_LE, "UTF-32"),  # before UTF-16, whose mark it begins with
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)
_BEGINNING = 1024  # bytes in which the expressions above have to match


def _refuse_binary(head: bytes) -> None:
    for mark, name in _OTHER_UNICODE:
        if head.startswith(mark):
            raise BrokenFile(f"{name} text: convert it (iconv -f {name} -t UTF-8)")
    for magic, name in _BINARY:
        if re.match(magic, head[:_BEGINNING], re.DOTALL):
            raise BrokenFile(f"{name}, not text: convert it or take it out")
    _refuse_zero(head, 0)


def _refuse_zero(block: bytes, start: int) -> None:
    if (zero := block.find(0)) >= 0:
        raise BrokenFile(f"binary, not text (byte {start + zero} is zero): take it out")


# --- Text ---


def _read_text(blocks: Iterator[bytes], name: str, _: str) -> Iterator[Document | Problem]:
    yield from _pieces(name, _decode(blocks))


def _decode(blocks: Iterable[bytes]) -> Iterator[str]:
    """UTF-8 to text without a byte order mark, nothing else changed."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    start = 0  # of the block, in the file
    for block in chain(blocks, [b""]):
        _refuse_zero(block, start)
        begun = len(decoder.getstate()[0])  # bytes of a character that the last block ended in
        try:
            text = decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            where = start - begun + error.start
            raise BrokenFile(f"not UTF-8 text (byte {where}): convert it or take it out") from error
        yield text if start else text.removeprefix("\ufeff")
        start += len(block)


def _pieces(name: str, texts: Iterable[str]) -> Iterator[Document]:
    """One document, in pieces if it is long, and none if it is empty."""
    rest, begun = "", False
    try:
        for text in texts:
            rest += text
            while len(rest) > _PIECE:
                end = rest.rfind("\n", 0, _PIECE) + 1 or _PIECE
                yield Document(name, rest[:end], continues=True)
                rest, begun = rest[end:], True
    except BrokenFile:
        if begun:  # what has been read of it remains, and ends here
            yield Document(name, rest)
        raise
    if rest:
        yield Document(name, rest)


# --- JSON ---


def _read_json(blocks: Iterator[bytes], name: str, text_field: str) -> Iterator[Document | Problem]:
    """A `.json` file: an array or an object of several lines, else JSON lines."""
    head, blocks = _peek(blocks)
    content = head.removeprefix(_UTF8_BOM).lstrip()
    if content.startswith(b"["):
        yield from _read_array(blocks, name, text_field)
    elif content.startswith(b"{") and _ends_early(content.partition(b"\n")[0]):
        yield from _record(f"{name}:1", text_field, _whole(blocks))
    else:
        yield from _read_json_lines(blocks, name, text_field)


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
        if size > _LARGEST_RECORD:
            return None
    return b"".join(content)


def _read_json_lines(
    blocks: Iterator[bytes], name: str, text_field: str
) -> Iterator[Document | Problem]:
    for number, line in enumerate(_lines(blocks), start=1):
        if line is None or (line and not line.isspace()):
            yield from _record(f"{name}:{number}", text_field, line)


def _lines(blocks: Iterable[bytes]) -> Iterator[bytes | None]:
    """The lines without their ends; None for one that is too large for a record."""
    parts: list[bytes] = []
    size = 0
    for block in chain(blocks, [b"\n"]):
        for index, part in enumerate(block.split(b"\n")):
            if index:  # the line before has ended
                yield b"".join(parts) if size <= _LARGEST_RECORD else None
                parts, size = [], 0
            size += len(part)
            if size <= _LARGEST_RECORD:
                parts.append(part)
            else:
                parts.clear()


def _record(name: str, text_field: str, content: bytes | None) -> Iterator[Document | Problem]:
    """The document in a JSON object; no content means that it was too large."""
    try:
        if content is None:
            raise ValueError(_TOO_LARGE)
        text = _text_of(_parse(content), text_field)
    except ValueError as error:
        yield Problem(name, str(error))
    else:
        yield from _pieces(name, [text])


def _parse(content: bytes) -> Any:
    """The JSON value. Raises ValueError saying what is wrong and what to do."""
    try:
        return parse_json(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 text (byte {error.start}): convert the file") from error
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, " if error.lineno > 1 else ""
        raise ValueError(
            f"broken JSON ({error.msg}, {where}column {error.colno}): fix or remove it"
        ) from error
    except ValueError as error:
        raise ValueError(f"unreadable JSON ({error}): fix or remove it") from error


def _text_of(value: Any, text_field: str) -> str:
    """The text in a JSON value. Raises ValueError saying what is wrong and what to do."""
    if not isinstance(value, dict):
        raise ValueError('not a JSON object: write {"' + text_field + '": "..."}')
    if text_field not in value:
        fields = ", ".join(map(repr, value)) or "none"
        raise ValueError(f"no field {text_field!r} (it has: {fields}): set text_field")
    text = value[text_field]
    if not isinstance(text, str):
        raise ValueError(f"field {text_field!r} is not a string: fix it or set text_field")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"field {text_field!r} holds half a surrogate pair, which is no text: fix it"
        ) from error
    return text


def _read_array(
    blocks: Iterator[bytes], name: str, text_field: str
) -> Iterator[Document | Problem]:
    for number, value in enumerate(_elements(_decode(blocks)), start=1):
        element = f"{name}:element {number}"
        try:
            text = _text_of(value, text_field)
        except ValueError as error:
            yield Problem(element, str(error))
        else:
            yield from _pieces(element, [text])


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
            if len(rest) > _LARGEST_RECORD:
                raise BrokenFile(f"element {number} is {_TOO_LARGE}") from error
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


# --- Parquet ---


def _read_parquet(file: BufferedIOBase, name: str, column: str) -> Iterator[Document | Problem]:
    try:
        import pyarrow
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise HymbaError(
            f"{name}: reading Parquet takes pyarrow: pip install 'hymba_jax[parquet]'"
        ) from error
    try:
        # By default, the whole column of a row group is read at once.
        table = ParquetFile(file, buffer_size=_BLOCK, pre_buffer=False)
        _refuse_column(table.schema_arrow, column)
        number = 0
        for batch in table.iter_batches(_ROWS, columns=[column], use_threads=False):
            for value in batch.column(0):
                number += 1
                yield from _row(f"{name}:row {number}", value)
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # of the file itself: Arrow's have no number
        reason = str(error).partition("\n")[0]
        raise BrokenFile(f"broken Parquet ({reason}): copy the file again") from error


def _refuse_column(schema: Any, column: str) -> None:
    from pyarrow import types

    index = schema.get_field_index(column)
    if index < 0:
        columns = ", ".join(map(repr, schema.names)) or "none"
        raise BrokenFile(f"no column {column!r} (it has: {columns}): set text_field")
    kind = schema.field(index).type
    kind = kind.value_type if types.is_dictionary(kind) else kind
    if str(kind) not in ("string", "large_string", "string_view"):
        raise BrokenFile(f"column {column!r} is {kind}, not string: convert it or set text_field")


def _row(name: str, value: Any) -> Iterator[Document | Problem]:
    try:
        text = value.as_py()
    except UnicodeDecodeError as error:
        yield Problem(name, f"not UTF-8 text (byte {error.start}): fix or remove the row")
        return
    if text is None:
        yield Problem(name, "null instead of text: fill in or remove the row")
    elif len(text) > _LARGEST_RECORD:
        yield Problem(name, _TOO_LARGE)
    else:
        yield from _pieces(name, [text])


type _Reader = Callable[[Iterator[bytes], str, str], Iterator[Document | Problem]]

_READERS: dict[str, _Reader] = {
    ".jsonl": _read_json_lines,
    ".ndjson": _read_json_lines,
    ".json": _read_json,
}
