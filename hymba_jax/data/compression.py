"""Compressed files: gzip, zstd, xz and bzip2, told apart by what they begin with."""

import bz2
import lzma
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import zstandard

from hymba_jax.data import records
from hymba_jax.data.records import BrokenFile

# Bytes that are decompressed at once: each may become 32 KiB.
_COMPRESSED_BLOCK = 1 << 12


class Compression(NamedTuple):
    """A way to compress, and how it is undone."""

    name: str
    magic: bytes  # a regular expression
    start: Callable[[], Any]
    error: type[Exception]


def _start_zstd() -> Any:
    # The largest window, as of `zstd --long=31`, in which large corpora are published.
    return zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()


_COMPRESSIONS = (
    Compression("gzip", rb"\x1f\x8b\x08", lambda: zlib.decompressobj(31), zlib.error),
    # A frame, or one to skip, with which those begin that several threads have written.
    Compression(
        "zstd", rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18", _start_zstd, zstandard.ZstdError
    ),
    Compression("xz", rb"\xfd7zXZ\0", lzma.LZMADecompressor, lzma.LZMAError),
    # With the mark of a block or of the end: "BZh" alone may be text.
    Compression("bzip2", rb"BZh[1-9](1AY&SY|\x17rE8P\x90)", bz2.BZ2Decompressor, OSError),
)


def find_compression(head: bytes) -> Compression | None:
    """The compression of a file that begins so; None if it is not compressed."""
    return next((c for c in _COMPRESSIONS if re.match(c.magic, head)), None)


def decompress(blocks: Iterable[bytes], compression: Compression) -> Iterator[bytes]:
    """All members or frames, one after the other, in blocks of at least a megabyte but the last.

    Raises:
      BrokenFile: the data are corrupt or truncated; what comes before was returned.
    """
    return _grouped(_decompress(blocks, compression))


def _decompress(blocks: Iterable[bytes], compression: Compression) -> Iterator[bytes]:
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


def _grouped(blocks: Iterable[bytes]) -> Iterator[bytes]:
    """The same bytes in blocks of at least records.BLOCK, but for the last."""
    group, size = [], 0
    try:
        for block in blocks:
            group.append(block)
            size += len(block)
            if size >= records.BLOCK:
                yield b"".join(group)
                group, size = [], 0
    except BrokenFile:
        yield b"".join(group)  # what comes before remains
        raise
    yield b"".join(group)
