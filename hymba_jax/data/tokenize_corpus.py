"""Documents to shards of tokens: on all cores, in bounded memory, resumable to the byte.

Files are taken in order, in units of a few hundred megabytes (`tokenize_records.py`). A unit
becomes one shard for training and one for validation, or several pairs where it has many tokens.
Each pair is recorded when it is written: a run that was killed skips what is recorded, and since a
shard depends on files and options alone, its bytes are those of a run that was never stopped. Units
are also what hosts share: of n parts, part i has every n-th one.
"""

import errno
import json
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from itertools import chain, groupby
from pathlib import Path
from typing import NamedTuple, TextIO

import numpy as np

from hymba_jax.closing import Closing
from hymba_jax.data import tokenize_records
from hymba_jax.data.block_checksums import BlockChecksums, checksums_file, file_checksum
from hymba_jax.data.corpus import Corpus
from hymba_jax.data.encoder import Encoded, Encoder, Text, default_workers
from hymba_jax.data.loss_mask import MaskWriter, mask_file
from hymba_jax.data.manifest import (
    MANIFEST,
    TRAIN,
    VALIDATION,
    Manifest,
    ShardInfo,
    Side,
    Source,
    TokenizerInfo,
)
from hymba_jax.data.megatron import MegatronWriter, megatron_files, token_dtype
from hymba_jax.data.records import Document, Problem
from hymba_jax.data.tokenize_progress import Progress, ProgressLine, total_size
from hymba_jax.data.tokenize_records import UnitRecord, corpus_digest, make_units, record_path
from hymba_jax.display import Display
from hymba_jax.errors import HymbaError
from hymba_jax.files import replace_text
from hymba_jax.tokenizer import Tokenizer

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def tokenize_corpus(
    corpus: Corpus,
    tokenizer: Tokenizer,
    directory: Path,
    display: Display,
    *,
    workers: int = 0,
    part: int = 0,
    parts: int = 1,
) -> Manifest | None:
    """Tokenizes a corpus, or its part, into a directory that `tokenize_records.begin` has begun.

    Args:
      tokenizer: that of the directory.
      workers: processes; 0: one for each core, or one in all for little text.
      part, parts: of the units of files every `parts`-th one, from `part` on.

    Returns:
      The manifest; None if other parts are not done yet.

    Raises:
      HymbaError: a file cannot be read, has bad records that are not to be skipped, or the
        tokenizer fails.
      OSError: the shards cannot be written.
    """
    path = directory / MANIFEST
    if path.exists():
        return Manifest.read(path)
    line = ProgressLine(display)
    writer = CorpusWriter(corpus, tokenizer, directory, line.show, part, parts)
    with Encoder(tokenizer, workers or default_workers(writer.total_bytes)) as encoder:
        writer.write(encoder)
    return None if writer.remaining_units() else writer.write_manifest()


@contextmanager
def one_line_full_disk(directory: Path) -> Iterator[None]:
    """Raises HymbaError where the disk that a directory is on is full."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise HymbaError(
                f"{directory}: cannot be written ({error.strerror}): make room and run the same "
                "command again to resume"
            ) from error
        error.filename = error.filename or str(directory)
        raise


class CorpusWriter:
    """Tokenizes a corpus into a directory, which `tokenize_records.begin` has begun.

    Args:
      tokenizer: that of the directory.
      on_progress: called after every piece of a document.
      part, parts: of the units those that this process has, from 0.

    Attributes:
      total_bytes: of the files that this process has, as they are stored.
    """

    def __init__(
        self,
        corpus: Corpus,
        tokenizer: Tokenizer,
        directory: Path,
        on_progress: Callable[[Progress], None],
        part: int = 0,
        parts: int = 1,
    ) -> None:
        self._corpus, self._tokenizer, self._directory = corpus, tokenizer, directory
        self._on_progress = on_progress
        self._units = make_units(corpus.files)
        self._own = range(part, len(self._units), parts)
        self._owns_all = parts == 1
        self._digest = corpus_digest(directory, tokenizer.fingerprint)
        self.total_bytes = sum(total_size(self._units[unit]) for unit in self._own)
        self._progress = Progress(self.total_bytes)

    def write(self, encoder: Encoder) -> None:
        """Tokenizes every unit of this process that is not done yet.

        Raises:
          HymbaError: a file cannot be read, has bad records that are not to be skipped, or the
            tokenizer fails.
          OSError: the shards cannot be written.
        """
        self._remove_leftovers()
        for unit in self._own:
            record = self._record(unit)
            if record.done:
                self._progress.skip(self._units[unit])
            else:
                self._write_unit(unit, record, encoder)

    def remaining_units(self) -> int:
        """How many units of the corpus are not done, those of other processes among them."""
        return sum(not self._record(unit).done for unit in range(len(self._units)))

    def write_manifest(self) -> Manifest:
        """Writes the manifest of the corpus, all of whose units are done."""
        records = [self._record(unit) for unit in range(len(self._units))]
        files, tokenizer = self._corpus.files, self._tokenizer
        manifest = Manifest(
            sources=(Source(self._corpus.path, len(files), total_size(files)),),
            options=self._corpus.options,
            tokenizer=TokenizerInfo(
                fingerprint=tokenizer.fingerprint,
                vocab_size=tokenizer.vocab_size,
                dtype=token_dtype(tokenizer.vocab_size).name,
                bos_id=tokenizer.bos_id,
                eos_id=tokenizer.eos_id,
            ),
            skipped=sum(record.skipped for record in records),
            train=Side.of(shard for record in records for shard in record.shards[TRAIN]),
            validation=Side.of(shard for record in records for shard in record.shards[VALIDATION]),
        )
        manifest.write(self._directory / MANIFEST)
        return manifest

    def _record(self, unit: int) -> UnitRecord:
        return UnitRecord.read(record_path(self._directory, unit), self._digest)

    def _write_unit(self, unit: int, record: UnitRecord, encoder: Encoder) -> None:
        path = record_path(self._directory, unit)
        files = self._progress.following(self._units[unit])
        with _Skipped(path.with_suffix(".skipped.jsonl")) as skipped:
            texts = _after(record.documents, self._corpus.documents(files, skipped.add))
            documents = groupby(encoder.encode(texts), lambda encoded: encoded[1])
            index = max(len(shards) for shards in record.shards.values())
            while not record.done:
                self._write_shards(f"{unit:05}-{index:03}", record, documents)
                index += 1
                record.skipped = skipped.count if record.done else 0
                record.write(path)

    def _write_shards(
        self,
        name: str,
        record: UnitRecord,
        documents: Iterator[tuple["_Key", Iterator[tuple[Encoded, "_Key"]]]],
    ) -> None:
        """Writes a shard of each side that has documents, until they are full or there are no more.

        The two are closed together, so that one number says which documents were written.
        """
        writers: dict[str, _ShardWriter] = {}
        with ExitStack() as stack:
            for key, pieces in documents:
                if key.side not in writers:
                    path = self._directory / f"{key.side}-{name}"
                    shard = _writing(path, self._tokenizer, has_mask=self._corpus.has_answers)
                    writers[key.side] = stack.enter_context(shard)
                writers[key.side].write(self._followed(piece for piece, _ in pieces))
                self._progress.documents += 1
                record.documents += 1
                tokens = max(writer.tokens for writer in writers.values())
                if tokens >= tokenize_records.SHARD_TOKENS:
                    break
            else:
                record.done = True
        for side, writer in writers.items():
            record.shards[side].append(writer.info())

    def _followed(self, pieces: Iterable[Encoded]) -> Iterator[Encoded]:
        for piece in pieces:
            yield piece
            self._progress.tokens += len(piece.ids)
            self._progress.text_bytes += piece.text_bytes
            self._on_progress(self._progress)

    def _remove_leftovers(self) -> None:
        """Removes the unfinished files of earlier runs, not those that another part is writing."""
        for directory in (self._directory, self._directory / tokenize_records.UNITS):
            for path in directory.glob("*.partial"):
                unit = re.match(r"(?:[a-z]+-)?(\d{5,})[-.]", path.name)
                if self._owns_all or (unit and int(unit[1]) in self._own):
                    path.unlink(missing_ok=True)


class _Key(NamedTuple):
    """Which document of a unit a piece is of, from 0, and its side."""

    number: int
    side: str


def _after(count: int, documents: Iterable[tuple[Document, str]]) -> Iterator[tuple[Text, _Key]]:
    """The texts of the documents but for the first `count`."""
    number = 0
    for document, side in documents:
        if number >= count:
            yield document.chat or document.text, _Key(number, side)
        number += not document.continues


class _ShardWriter:
    """Writes a shard: documents with the tokens before and after each, and their checksums.

    Conversations have no such tokens but those that the chat template writes, and a mask.
    """

    def __init__(
        self,
        path: Path,
        tokenizer: Tokenizer,
        writer: MegatronWriter,
        mask_writer: MaskWriter | None,
    ) -> None:
        dtype = token_dtype(tokenizer.vocab_size)
        self._path, self._writer, self._mask_writer = path, writer, mask_writer
        is_text = mask_writer is None
        self._before = [Encoded(np.array(tokenizer.bos_ids, dtype), 0)] * is_text
        self._after = [Encoded(np.array([tokenizer.eos_id], dtype), 0)] * is_text
        self._checksums = BlockChecksums()
        self.documents = self.tokens = self.text_bytes = 0

    def write(self, pieces: Iterable[Encoded]) -> None:
        """Adds a document; of a pair, whose sides are conversations, both."""
        for document in [pieces] if self._mask_writer is None else ([side] for side in pieces):
            self._writer.write(self._counted(document))
            self.documents += 1

    def write_checksums(self) -> None:
        """Writes `NAME.bin.crc`."""
        replace_text(checksums_file(megatron_files(self._path)[0]), self._checksums.text())

    def info(self) -> ShardInfo:
        """What the manifest has about the shard, all of whose files are there."""
        tokens, index = megatron_files(self._path)
        mask = checksums_file(mask_file(self._path))
        return ShardInfo(
            name=self._path.name,
            documents=self.documents,
            tokens=self.tokens,
            text_bytes=self.text_bytes,
            index_bytes=index.stat().st_size,
            index_crc32=file_checksum(index),
            blocks_crc32=file_checksum(checksums_file(tokens)),
            mask_crc32=file_checksum(mask) if self._mask_writer else None,
        )

    def _counted(self, pieces: Iterable[Encoded]) -> Iterator[np.ndarray]:
        for piece in chain(self._before, pieces, self._after):
            self._checksums.update(piece.ids)
            if self._mask_writer and piece.mask is not None:
                self._mask_writer.write(piece.mask)
            self.tokens += len(piece.ids)
            self.text_bytes += piece.text_bytes
            yield piece.ids


@contextmanager
def _writing(path: Path, tokenizer: Tokenizer, *, has_mask: bool) -> Iterator[_ShardWriter]:
    """A shard that is there, with its checksums, at the end of the context."""
    with (
        MegatronWriter(path, tokenizer.vocab_size) as megatron_writer,
        MaskWriter(path) if has_mask else nullcontext() as mask_writer,
    ):
        writer = _ShardWriter(path, tokenizer, megatron_writer, mask_writer)
        yield writer
    writer.write_checksums()


class _Skipped(Closing):
    """A file that lists the records that were skipped, if there are any; a context."""

    def __init__(self, path: Path) -> None:
        path.unlink(missing_ok=True)  # of a run that was killed
        self._path = path
        self._file: TextIO | None = None
        self.count = 0

    def add(self, problem: Problem) -> None:
        """Writes a line."""
        if self._file is None:
            self._file = self._path.open("w", buffering=1)  # by lines: the record comes after
        self._file.write(json.dumps({"name": problem.name, "reason": problem.reason}) + "\n")
        self.count += 1

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
