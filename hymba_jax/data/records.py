"""Documents and their problems: what the readers of all formats share."""

import codecs
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any, Protocol, runtime_checkable

from hymba_jax.tokenizer.answers import ChatPair, ChatText

PIECE = 1 << 24
"""Characters of a piece at most, and so of what is tokenized at once."""

LARGEST_RECORD = 1 << 30
"""Of one record, bytes or characters."""

TOO_LARGE = "longer than 1 GiB, the most that one record may be: split it into several"

BLOCK = 1 << 20
"""Bytes that are read at once."""


@dataclass(frozen=True)
class Document:
    """A text of a corpus, one piece of a long one, or one side of a pair of conversations.

    Attributes:
      name: that of its record, below the corpus.
      text: not empty; 16 Mi characters at most.
      continues: whether the next document is the next piece of this one, or the rejected side of
        a pair whose chosen one this is. Pieces end at line ends, if they have any.
      chat: of a conversation, which is never in pieces: the same text and where its answers are.
    """

    name: str
    text: str
    continues: bool = False
    chat: ChatText | None = None


@dataclass(frozen=True)
class Problem:
    """A record that is no document, or a file that cannot be read on.

    Attributes:
      name: that of the record or the file, below the corpus.
      reason: what is wrong, and what to do.
      whole_file: whether it is a file; documents before the problem remain.
      is_bad: whether something is wrong with it. With an empty record nothing is: it is skipped,
        whatever is done about bad ones.
      is_rare: whether others may be good. If a table lacks columns, those beside it will, too.
    """

    name: str
    reason: str
    whole_file: bool = False
    is_bad: bool = True
    is_rare: bool = True


@runtime_checkable
class Content(Protocol):
    """What of a record is the document.

    `of_json` and `of_row` raise ValueError saying what is wrong, and what to do.
    """

    @property
    def options(self) -> dict[str, str]:
        """What decides the documents beside the files and the tokenizer."""

    def of_json(self, value: Any) -> str | ChatText | ChatPair:
        """That of a JSON value."""

    def of_row(self, row: dict[str, Any]) -> str | ChatText | ChatPair:
        """That of a row of Parquet with the columns of `columns`."""

    def columns(self, schema: Any) -> list[str]:
        """The columns that are read of a table of Arrow. Raises WrongColumns."""

    def of_file(self, blocks: Iterator[bytes]) -> Iterator[str]:
        """The text of a file that has no records. Raises BrokenFile."""


class BrokenFile(ValueError):
    """What is wrong with a file from here on, and what to do, without its name."""


class WrongColumns(BrokenFile):
    """The same of a table whose columns are not those of the documents."""


def peek(blocks: Iterator[bytes]) -> tuple[bytes, Iterator[bytes]]:
    """The first block, and all of them."""
    head = next(blocks, b"")
    return head, chain([head], blocks)


def decode(blocks: Iterable[bytes]) -> Iterator[str]:
    """UTF-8 to text without a byte order mark, nothing else changed."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    start = 0  # of the block, in the file
    for block in chain(blocks, [b""]):
        refuse_zero(block, start)
        begun = len(decoder.getstate()[0])  # bytes of a character that the last block ended in
        try:
            text = decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            where = start - begun + error.start
            raise BrokenFile(f"not UTF-8 text (byte {where}): convert it or take it out") from error
        yield text if start else text.removeprefix("\ufeff")
        start += len(block)


def refuse_zero(block: bytes, start: int) -> None:
    """Raises BrokenFile if a block, from byte `start` of its file, has a zero byte."""
    if (zero := block.find(0)) >= 0:
        raise BrokenFile(f"binary, not text (byte {start + zero} is zero): take it out")


def documents(name: str, content: str | ChatText | ChatPair) -> Iterator[Document | Problem]:
    """The document of a record, in pieces if it is a long text; of a pair both."""
    if isinstance(content, str):
        yield from pieces(name, [content])
    elif isinstance(content, ChatPair):
        yield Document(name, content.chosen.text, continues=True, chat=content.chosen)
        yield Document(name, content.rejected.text, chat=content.rejected)
    else:
        yield Document(name, content.text, chat=content)


def pieces(name: str, texts: Iterable[str]) -> Iterator[Document | Problem]:
    """One document, in pieces if it is long, or that its record is empty."""
    rest, begun = "", False
    try:
        for text in texts:
            rest += text
            while len(rest) > PIECE:
                end = rest.rfind("\n", 0, PIECE) + 1 or PIECE
                yield Document(name, rest[:end], continues=True)
                rest, begun = rest[end:], True
    except BrokenFile:
        if begun:  # what has been read of it remains, and ends here
            yield Document(name, rest)
        raise
    if rest:
        yield Document(name, rest)
    else:
        yield Problem(name, "has no text", is_bad=False)
