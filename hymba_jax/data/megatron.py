"""Megatron's indexed dataset: token ids in `NAME.bin`, sequences and documents in `NAME.idx`.

The index, all of it little-endian:

| type            | values                                                                   |
|-----------------|--------------------------------------------------------------------------|
| 9 bytes         | `MMIDIDX` and two zeros                                                  |
| u64             | version, 1                                                               |
| u8              | dtype of the token ids, a number from `DTYPES`                           |
| u64             | sequences                                                                |
| u64             | entries of the last array, one more than there are documents             |
| i32, a sequence | its tokens                                                               |
| i64, a sequence | the byte of `NAME.bin` at which it starts                                |
| i64, an entry   | the sequence at which a document starts; the last one ends the documents |

Documents are written here as one sequence each. Those of others may have several.
"""

import errno
import os
import secrets
import shutil
import struct
import tempfile
from bisect import bisect_left, bisect_right
from collections.abc import Iterable
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np

from hymba_jax.errors import HymbaError
from hymba_jax.files import PathLike, open_regular, resolve_path
from hymba_jax.types import Bool, Int, UInt

DTYPES: dict[int, Any] = {
    1: np.uint8,
    2: np.int8,
    3: np.int16,
    4: np.int32,
    5: np.int64,
    6: np.float64,
    7: np.float32,
    8: np.uint16,
}
"""By the number that stands for them."""

_MAGIC, _VERSION = b"MMIDIDX\0\0", 1
_HEADER = struct.Struct("<9sQBQQ")
_LONGEST_SEQUENCE = 2**31 - 1
# Entries of an index that are looked at together.
_CHUNK = 1 << 18
_COUNTED = 1 << 24  # tokens whose documents are counted together
# Of an index with more sequences, opening it checks both ends and places between them.
_CHECKED_WHOLE, _SAMPLES, _SAMPLE = 1 << 15, 16, 1024


def megatron_files(path: PathLike) -> tuple[Path, Path]:
    """The token file and the index that `NAME`, `NAME.bin` and `NAME.idx` all stand for."""
    path = resolve_path(path)
    name = path.stem if path.suffix in (".bin", ".idx") else path.name
    return path.with_name(f"{name}.bin"), path.with_name(f"{name}.idx")


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """What ids below `vocab_size` are written as: up to 65536 uint16, else int32."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<i4")


class MegatronWriter:
    """Writes documents in Megatron's format: a context, at whose end the two files are there.

    Until then they have other names beside, and an exception leaves whatever was there before.
    Memory does not grow with the corpus.

    Args:
      path: `NAME`, for `NAME.bin` and `NAME.idx`.
      vocab_size: ids are below it; `token_dtype` has how they are stored.
    """

    def __init__(self, path: PathLike, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._dtype = token_dtype(vocab_size)
        self._targets = megatron_files(path)
        ending = f".{secrets.token_hex(4)}.partial"
        self._partials = tuple(target.with_name(target.name + ending) for target in self._targets)

    def __enter__(self) -> "MegatronWriter":
        directory = self._targets[0].parent
        directory.mkdir(parents=True, exist_ok=True)
        self._tokens = self._partials[0].open("xb")
        # The columns of the index, until their lengths are known.
        self._lengths = tempfile.TemporaryFile(dir=directory)
        self._documents = tempfile.TemporaryFile(dir=directory)
        self._documents.write(struct.pack("<q", 0))
        self._num_sequences, self._num_documents = 0, 0
        return self

    def write(self, pieces: Iterable[np.ndarray]) -> None:
        """Adds a document, which may come in pieces: 1-D arrays of token ids.

        Raises:
          HymbaError: an id is outside of the vocabulary.
        """
        length = 0
        for piece in pieces:
            self._check_ids(piece)
            self._tokens.write(piece.astype(self._dtype).data)
            length += len(piece)
        for start in range(0, length, _LONGEST_SEQUENCE):
            self._lengths.write(struct.pack("<i", min(length - start, _LONGEST_SEQUENCE)))
            self._num_sequences += 1
        self._documents.write(struct.pack("<q", self._num_sequences))
        self._num_documents += 1

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with ExitStack() as stack:  # all of it, even on a full disk, where closing a file fails
            for path in self._partials:
                stack.callback(path.unlink, missing_ok=True)
            for file in (self._tokens, self._lengths, self._documents):
                stack.callback(file.close)
            if kind is None:
                self._finish()

    def _check_ids(self, ids: np.ndarray) -> None:
        if ids.size and not 0 <= ids.min() <= ids.max() < self._vocab_size:
            raise HymbaError(
                f"{self._targets[0]}: document {self._num_documents} has token ids from "
                f"{ids.min()} to {ids.max()}, outside of a vocabulary of {self._vocab_size}"
            )

    def _finish(self) -> None:
        with self._partials[1].open("xb") as index:
            code = next(code for code, dtype in DTYPES.items() if dtype == self._dtype)
            index.write(
                _HEADER.pack(_MAGIC, _VERSION, code, self._num_sequences, self._num_documents + 1)
            )
            self._lengths.seek(0)
            shutil.copyfileobj(self._lengths, index)
            self._write_pointers(index)
            self._documents.seek(0)
            shutil.copyfileobj(self._documents, index)
            for file in (self._tokens, index):
                file.flush()
                os.fsync(file.fileno())
        # Whoever finds an index finds the tokens that it is of.
        self._targets[1].unlink(missing_ok=True)
        for partial, target in zip(self._partials, self._targets, strict=True):
            os.replace(partial, target)
        directory = os.open(self._targets[0].parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)

    def _write_pointers(self, index: IO[bytes]) -> None:
        pointer = 0
        self._lengths.seek(0)
        while content := self._lengths.read(4 * _CHUNK):
            ends = pointer + self._dtype.itemsize * np.cumsum(
                np.frombuffer(content, "<i4"), dtype="<i8"
            )
            index.write(np.concatenate([[pointer], ends[:-1]]).astype("<i8").data)
            pointer = int(ends[-1])


class MegatronShard:
    """The tokens of Megatron's two files, memory-mapped, as one stream in the order of the index.

    Opening takes the same time whatever the size, and checks the header, the sizes of both files
    and the index, of one with more than 32768 sequences samples and both ends: `check` looks at all
    of it. Where sequences do not lie one behind another in the token file, as
    some tools write them, the position of each is kept in memory, 8 bytes a sequence.

    Attributes:
      path: of the token file.
      num_tokens: of all sequences.

    Raises:
      HymbaError: a file is not there, is no such file, is truncated, or does not fit the other.
    """

    has_mask = False  # the loss is on all tokens

    def __init__(self, path: PathLike) -> None:
        self.path, self._index_path = megatron_files(path)
        code, num_sequences = self._read_header()
        dtype = np.dtype(DTYPES[code])
        self._itemsize, self._size = dtype.itemsize, file_size(self.path)
        if self._size % self._itemsize:
            raise HymbaError(
                f"{self.path}: {self._size} bytes are no whole number of {dtype} tokens: truncated?"
            )
        # Ids are not negative.
        unsigned = np.dtype(f"u{self._itemsize}")
        self._tokens = map_array(self.path, unsigned, self._size // self._itemsize)
        # One map: each takes a file descriptor, of which a process has about a thousand.
        index = map_array(self._index_path, np.dtype(np.uint8), file_size(self._index_path))
        pointers = _HEADER.size + 4 * num_sequences
        entries = pointers + 8 * num_sequences
        self._lengths = _Column(self._index_path, index, _HEADER.size, pointers, "<i4")
        self._pointers = _Column(self._index_path, index, pointers, entries, "<i8")
        self._documents = _Column(self._index_path, index, entries, len(index), "<i8")
        self._starts = None if self._looks_contiguous() else self._cumulative_lengths()
        ends = self._size // self._itemsize if self._starts is None else self._starts[-1]
        self.num_tokens = int(ends)

    @cached_property
    def num_documents(self) -> int:
        """Documents that are not empty. Counting them reads the whole index."""
        starts = range(0, self.num_tokens, _COUNTED)
        stops = (min(start + _COUNTED, self.num_tokens) for start in starts)
        return sum(len(self.document_starts(*each)) for each in zip(starts, stops, strict=True))

    def read(self, start: int, stop: int) -> UInt[np.ndarray, " _"]:
        """The tokens from `start` up to `stop` of the stream; read-only."""
        if self._starts is None:
            return self._tokens[start:stop]
        first = bisect_right(self._starts, start) - 1
        last = bisect_left(self._starts, stop)
        parts = [self._tokens[:0]]
        for sequence in range(first, last):
            offset = self._pointers[sequence] // self._itemsize - int(self._starts[sequence])
            begin = max(start, int(self._starts[sequence]))
            parts.append(
                self._tokens[offset + begin : offset + min(stop, int(self._starts[sequence + 1]))]
            )
        return np.concatenate(parts)

    def read_mask(self, start: int, stop: int) -> Bool[np.ndarray, " _"]:
        """Whether the loss is on each of the tokens from `start` up to `stop`."""
        return np.ones(stop - start, bool)

    def document_starts(self, start: int, stop: int) -> Int[np.ndarray, " _"]:
        """The positions from `start` up to `stop` at which documents start, rising; no empty ones.

        Takes time in proportion to the documents found, but for two binary searches in the index.
        """
        documents = range(len(self._documents) - 1)
        first = bisect_left(documents, start, key=self._document_start)
        last = bisect_left(documents, stop, lo=first, key=self._document_start)
        if first == last:
            return np.empty(0, np.int64)
        starts = self._sequence_starts(self._documents.mapped(first, last))
        return starts[np.diff(starts, prepend=-1) > 0]

    def check(self) -> None:
        """Checks the whole index, in time in proportion to it and little memory.

        Raises:
          HymbaError: it names tokens that are not there, or contradicts itself.
        """
        for start in range(0, len(self._lengths), _CHUNK):
            follow = self._check_sequences(start, start + _CHUNK)
            if self._starts is None and not follow:
                raise HymbaError(
                    f"{self._index_path}: sequences from {start} on do not follow one another, "
                    "unlike most: write the dataset again"
                )
        for start in range(0, len(self._documents), _CHUNK):
            self._check_documents(start, start + _CHUNK)

    def _read_header(self) -> tuple[int, int]:
        size = file_size(self._index_path)
        with self._index_path.open("rb") as file:
            header = file.read(_HEADER.size)
        if header[: len(_MAGIC)] != _MAGIC:
            raise HymbaError(f"{self._index_path}: no Megatron index (it begins otherwise)")
        if len(header) < _HEADER.size:
            raise HymbaError(f"{self._index_path}: truncated: {size} bytes")
        _, version, code, num_sequences, num_entries = _HEADER.unpack(header)
        if version != _VERSION:
            raise HymbaError(
                f"{self._index_path}: version {version} of the format, only {_VERSION} is read"
            )
        if code not in DTYPES or np.dtype(DTYPES[code]).kind == "f":
            name = np.dtype(DTYPES[code]).name if code in DTYPES else f"number {code}"
            raise HymbaError(f"{self._index_path}: dtype {name} is none of token ids")
        expected = _HEADER.size + 12 * num_sequences + 8 * num_entries
        if size != expected or not num_entries:
            raise HymbaError(
                f"{self._index_path}: {size} bytes, but {num_sequences} sequences and "
                f"{num_entries} entries of documents take {expected}: truncated, or not of text"
            )
        return code, num_sequences

    def _looks_contiguous(self) -> bool:
        """Checks an index's ends and samples, or a small one whole.

        Returns whether its sequences follow one another in the token file.
        """
        if self._documents[0] != 0 or self._documents[-1] != len(self._lengths):
            raise HymbaError(
                f"{self._index_path}: documents are sequences {self._documents[0]} up to "
                f"{self._documents[-1]}, not 0 up to {len(self._lengths)}"
            )
        for start, stop in _samples(len(self._documents)):
            self._check_documents(start, stop)
        follow = [self._check_sequences(*sample) for sample in _samples(len(self._lengths))]
        if not follow:
            end = 0
        elif not all(follow) or self._pointers[0] != 0:
            return False
        else:
            end = self._pointers[-1] + self._itemsize * self._lengths[-1]
        if end != self._size:
            raise HymbaError(
                f"{self._index_path}: its sequences take {end} bytes, but {self.path} has "
                f"{self._size}: they are not of one dataset, or one was not written to the end"
            )
        return True

    def _check_sequences(self, start: int, stop: int) -> bool:
        """Whether these sequences, and the one after them, follow one another."""
        lengths = self._lengths.read(start, stop).astype(np.int64)
        pointers = self._pointers.read(start, stop + 1)
        begin, nbytes = pointers[: len(lengths)], self._itemsize * lengths
        is_inside = (lengths >= 0) & (begin >= 0) & (begin <= self._size - nbytes)
        is_good = is_inside & (begin % self._itemsize == 0)
        if not is_good.all():
            i = int(is_good.argmin())
            raise HymbaError(
                f"{self._index_path}: sequence {start + i} has {lengths[i]} tokens from byte "
                f"{begin[i]}, which are not in {self.path} of {self._size} bytes"
            )
        return np.array_equal(pointers[1:], (begin + nbytes)[: len(pointers) - 1])

    def _check_documents(self, start: int, stop: int) -> None:
        entries = self._documents.read(start, stop + 1)
        if entries.min() < 0 or entries.max() > len(self._lengths) or (np.diff(entries) < 0).any():
            raise HymbaError(
                f"{self._index_path}: documents {start} to {start + len(entries) - 1} are not "
                f"rising sequences of {len(self._lengths)}"
            )

    def _cumulative_lengths(self) -> Int[np.ndarray, " _"]:
        starts = np.zeros(len(self._lengths) + 1, np.int64)
        np.cumsum(self._lengths.read(0, len(self._lengths)), out=starts[1:])
        return starts

    def _document_start(self, document: int) -> int:
        """The position of a document's first token."""
        sequence = self._documents[document]
        if self._starts is not None:
            return int(self._starts[sequence])
        if sequence == len(self._lengths):
            return self.num_tokens
        return self._pointers[sequence] // self._itemsize

    def _sequence_starts(self, sequences: Int[np.ndarray, " _"]) -> Int[np.ndarray, " _"]:
        """The position of each sequence's first token; rising sequences."""
        if self._starts is not None:
            return self._starts[sequences]
        first = int(sequences[0])
        pointers = self._pointers.mapped(first, int(sequences[-1]) + 1)
        return pointers[sequences - first] // self._itemsize


class _Column:
    """One of an index's arrays, from byte `start` up to `stop` of the file."""

    def __init__(self, path: Path, index: np.ndarray, start: int, stop: int, dtype: str) -> None:
        self._path, self._offset, self._dtype = path, start, np.dtype(dtype)
        self._mapped = index[start:stop].view(dtype)

    def __len__(self) -> int:
        return len(self._mapped)

    def __getitem__(self, entry: int) -> int:
        return int(self._mapped[entry])

    def mapped(self, start: int, stop: int) -> Int[np.ndarray, " _"]:
        """Some entries, aligned: NumPy would copy the whole array to work with part of it."""
        return np.array(self._mapped[start:stop])

    def read(self, start: int, stop: int) -> Int[np.ndarray, " _"]:
        """Entries as far as there are any, without the pages around them, maybe huge, in memory."""
        count = max(min(stop, len(self)) - start, 0)
        offset = self._offset + start * self._dtype.itemsize
        return np.fromfile(self._path, self._dtype, count, offset=offset)


def map_array(path: Path, dtype: np.dtype[Any], count: int) -> np.ndarray:
    """A file as a read-only array, which takes no memory of its own.

    Raises:
      HymbaError: it cannot be mapped.
    """
    if not count:
        return np.empty(0, dtype)  # an empty file cannot be
    try:
        mapped = np.memmap(path, dtype, "r", shape=(count,))
    except OSError as error:
        raise HymbaError(_os_message(path, error)) from error
    return mapped.view(np.ndarray)  # np.memmap is slow to index


def file_size(path: Path) -> int:
    """Bytes of a regular file.

    Raises:
      HymbaError: it is none, or cannot be opened.
    """
    try:
        with open_regular(path) as file:
            return os.fstat(file.fileno()).st_size
    except OSError as error:
        raise HymbaError(_os_message(path, error)) from error


def _os_message(path: Path, error: OSError) -> str:
    hint = ": raise `ulimit -n`" if error.errno == errno.EMFILE else ""
    return f"{path}: {(error.strerror or str(error)).lower()}{hint}"


def _samples(count: int) -> list[tuple[int, int]]:
    """The ranges of an array of this length that are checked when it is opened."""
    if count <= _CHECKED_WHOLE:
        return [(start, min(start + _CHUNK, count)) for start in range(0, count, _CHUNK)]
    starts = np.linspace(0, count - _SAMPLE, _SAMPLES).astype(np.int64)
    return [(start, start + _SAMPLE) for start in starts.tolist()]
