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

import codecs
import re
from collections.abc import Callable, Iterator
from functools import partial
from io import BufferedIOBase

from hymba_jax.data import records
from hymba_jax.data.compression import decompress, find_compression
from hymba_jax.data.json_records import read_json, read_json_lines
from hymba_jax.data.parquet_records import read_parquet
from hymba_jax.data.records import BrokenFile, Content, Document, Problem, peek, pieces, refuse_zero

# Text may begin with these letters, but Thrift, which follows, with nothing that is printed.
_PARQUET = re.compile(rb"PAR1(?![ -~\s])")


def read_records(file: BufferedIOBase, name: str, content: Content) -> Iterator[Document | Problem]:
    """The documents of a file in order, and each bad or empty record in its place.

    Args:
      file: open at its start; one of Parquet has to be seekable.
      content: what of each record is the document.

    Raises:
      BrokenFile: the file is not text, or broken from here on.
      HymbaError: it is Parquet, and pyarrow is not installed.
      OSError: it cannot be read.
    """
    head, blocks = peek(iter(partial(file.read, records.BLOCK), b""))
    suffix = _suffix(name)
    if _PARQUET.match(head):
        yield from read_parquet(file, name, content)
        return
    if compression := find_compression(head):
        head, blocks = peek(decompress(blocks, compression))
        if _PARQUET.match(head) or find_compression(head):
            raise BrokenFile(f"compressed twice: undo the {compression.name} compression")
    _refuse_binary(head)
    if suffix == ".parquet" and head:
        raise BrokenFile("not a Parquet file, in spite of its name: rename it or take it out")
    yield from _READERS.get(suffix, _read_text)(blocks, name, content)


def _suffix(name: str) -> str:
    """`.json` and the like, in lower case and without that of a compression."""
    stem = re.sub(r"\.(gz|zst|zstd|xz|bz2)$", "", name.rpartition("/")[2].lower())
    return "".join(stem.rpartition(".")[1:]) if "." in stem else ""


def _read_text(
    blocks: Iterator[bytes], name: str, content: Content
) -> Iterator[Document | Problem]:
    yield from pieces(name, content.of_file(blocks))


type _Reader = Callable[[Iterator[bytes], str, Content], Iterator[Document | Problem]]

_READERS: dict[str, _Reader] = {
    ".jsonl": read_json_lines,
    ".ndjson": read_json_lines,
    ".json": read_json,
}


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
    refuse_zero(head, 0)
