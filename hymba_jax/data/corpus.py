"""What text is tokenized: its files, how its documents are read, and which are held out."""

import hashlib
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from pathlib import Path, PurePosixPath

from hymba_jax.config.data import OnBadRecord
from hymba_jax.data.conversations import Conversations
from hymba_jax.data.documents import read_documents
from hymba_jax.data.listing import File
from hymba_jax.data.manifest import SIDES, TRAIN
from hymba_jax.data.preferences import Preferences
from hymba_jax.data.records import Content, Document, Problem
from hymba_jax.data.split import Split, document_hash, find_split, hold_out_tail
from hymba_jax.data.text_field import TextField

STANDARD_LIBRARY = "Python's standard library"

_NOT_LIBRARY = {"test", "idlelib", "site-packages", "dist-packages"}


def held_out_by_file_name(document: Document, fraction: float) -> bool:
    """The rule for the standard library, whose files differ between releases but for their names.

    With b the first byte of the SHA-1 of the name, a file is held out if an integer lies in
    (fraction (b - 1), fraction b]. For a fraction of 1/n these are the multiples of n.
    """
    byte = hashlib.sha1(PurePosixPath(document.name).name.encode()).digest()[0]
    exact = Fraction(str(fraction))  # of the decimal that was written: rounding decides nothing
    return byte * exact % 1 < exact


@dataclass(frozen=True)
class Corpus:
    """What is tokenized, and how its documents are read and split.

    Attributes:
      path: as it was given.
      files: those at the path, in order.
      content: what of each record is the document.
      on_bad_record: what is done about bad records.
      validation_fraction: about this share of the documents is held out; 0 holds out none, 1 all.
      held_out: whether a document is, by its first piece and the fraction; if absent, by a hash of
        its text, and so that neither side is empty.
      excluded: hashes of documents that are skipped, as they are for validation elsewhere.
    """

    path: str
    files: tuple[File, ...]
    content: Content = field(default_factory=TextField)
    on_bad_record: OnBadRecord = "stop"
    validation_fraction: float = 0.0
    held_out: Callable[[Document, float], bool] | None = None
    excluded: frozenset[int] = frozenset()

    @property
    def options(self) -> dict[str, str | float]:
        """What decides the documents beside the files."""
        return {
            **self.content.options,
            "on_bad_record": self.on_bad_record,
            "validation_fraction": self.validation_fraction,
            **({"excluded documents": _digest(self.excluded)} if self.excluded else {}),
        }

    @property
    def has_answers(self) -> bool:
        """Whether its documents are conversations, or come in pairs of them."""
        return isinstance(self.content, Conversations | Preferences)

    def documents(
        self, files: Iterable[File], report: Callable[[Problem], None] | None = None
    ) -> Iterator[tuple[Document, str]]:
        """The documents of some of the files, each with the side that it is on.

        Args:
          report: called with each bad or empty record, and each excluded document, that is skipped.

        Raises:
          HymbaError: as `read_documents` does.
        """
        documents = self._kept(
            read_documents(files, self.content, self.on_bad_record, report), report
        )
        if self.held_out is None and (length := self._split.only_length):
            for pieces in _whole(documents):
                for piece, is_tail in hold_out_tail(pieces, length, self.validation_fraction):
                    yield piece, SIDES[is_tail]
            return
        held_out = False
        for document, is_first in _with_starts(documents):
            if is_first and self.held_out:
                held_out = self.held_out(document, self.validation_fraction)
            elif is_first:
                held_out = document_hash(document.text) < self._split.limit
            yield document, SIDES[held_out]

    @property
    def exceptions(self) -> frozenset[int]:
        """Hashes of documents that are on another side than the fraction alone would have them."""
        return frozenset() if self.held_out else self._split.exceptions

    @cached_property
    def _split(self) -> Split:
        documents = self._kept(read_documents(self.files, self.content, self.on_bad_record))
        return find_split(_whole(documents), self.validation_fraction)

    def _kept(
        self, documents: Iterable[Document], report: Callable[[Problem], None] | None = None
    ) -> Iterator[Document]:
        """The documents that are not excluded; the others are reported."""
        if not self.excluded:
            yield from documents
            return
        excluded = False
        for document, is_first in _with_starts(documents):
            if is_first:
                excluded = document_hash(document.text) in self.excluded
                if excluded and report is not None:
                    report(Problem(document.name, "is held out for validation elsewhere"))
            if not excluded:
                yield document

    def training_texts(self) -> Iterator[str]:
        """The pieces of the documents that are trained on."""
        return (piece.text for piece, side in self.documents(self.files) if side == TRAIN)


def document_hashes(corpora: Iterable[Corpus]) -> frozenset[int]:
    """The hashes of all documents, for `Corpus.excluded`: 64 bytes of memory for each."""
    return frozenset(
        document_hash(document.text)
        for corpus in corpora
        for document, is_first in _with_starts(
            read_documents(corpus.files, corpus.content, corpus.on_bad_record)
        )
        if is_first
    )


def _with_starts(documents: Iterable[Document]) -> Iterator[tuple[Document, bool]]:
    """Each piece, and whether it is the first of its document."""
    is_first = True
    for document in documents:
        yield document, is_first
        is_first = not document.continues


def _whole(documents: Iterable[Document]) -> Iterator[Iterator[Document]]:
    """The pieces of each document."""
    stream = iter(documents)

    def pieces(first: Document) -> Iterator[Document]:
        yield first
        while first.continues:
            yield (first := next(stream))

    for first in stream:
        document = pieces(first)
        yield document
        for _ in document:  # what was not asked for
            pass


def _digest(hashes: frozenset[int]) -> str:
    """Tells a set of hashes from others."""
    content = b"".join(value.to_bytes(8) for value in sorted(hashes))
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def standard_library(validation_fraction: float) -> Corpus:
    """The sources of the running Python's standard library; its tests are left out."""
    root = Path(sysconfig.get_path("stdlib"))
    names = (path.relative_to(root) for path in sorted(root.rglob("*.py")))
    sizes = {name: (root / name).stat().st_size for name in names}
    return Corpus(
        path=STANDARD_LIBRARY,
        files=tuple(
            File(name.as_posix(), str(root / name), size)
            for name, size in sizes.items()
            if size and name.parts[0] not in _NOT_LIBRARY
        ),
        on_bad_record="skip",
        validation_fraction=validation_fraction,
        held_out=held_out_by_file_name,
    )
