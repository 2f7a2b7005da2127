"""Which side of the validation split text is on.

Documents are held out by a hash of their text, so that identical ones are on the same side and a
document stays on its side when others are added. Where that would leave a side empty, the document
with the lowest hash is held out, or that with the highest is not; a corpus of one document, however
often it has it, holds out its tail.
"""

import hashlib
import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import NamedTuple

from hymba_jax.data.records import Document


class Split(NamedTuple):
    """Which documents of a corpus are held out.

    Attributes:
      limit: those are whose hash is below it. It is the fraction of 2**64, the number of hashes, so
        that what a smaller fraction holds out, a larger one does, too.
      only_length: characters of the only text, which holds out its tail; 0 if there are several.
      exceptions: hashes of documents that the fraction alone would have on the other side, or whole
        on one.
    """

    limit: float
    only_length: int = 0
    exceptions: frozenset[int] = frozenset()


def find_split(documents: Iterable[Iterator[Document]], fraction: float) -> Split:
    """The split of documents, which are read until there is one on either side.

    Args:
      documents: the pieces of each.
      fraction: about this share is held out; 0 holds out none, 1 all.
    """
    split = Split(fraction * 2**64)
    if not 0 < fraction < 1:
        return split
    lowest, highest, length = 2**64, -1, sys.maxsize
    for pieces in documents:
        first = next(pieces)
        value = document_hash(first.text)
        lowest, highest = min(lowest, value), max(highest, value)
        if lowest < split.limit <= highest:
            return split
        if lowest == highest:  # the only one so far; a conversation has no tail
            whole = 0 if first.chat else len(first.text) + sum(len(piece.text) for piece in pieces)
            length = min(length, whole)
    if lowest < highest:
        is_without_validation = lowest >= split.limit
        limit, exception = (lowest + 1, lowest) if is_without_validation else (highest, highest)
        return Split(limit, exceptions=frozenset([exception]))
    if highest < 0 or length < 2:
        return split
    return Split(split.limit, length, frozenset([lowest]))


def document_hash(text: str) -> int:
    """64 bits that tell a document from others: the first of the BLAKE2b of its UTF-8, big-endian.

    Args:
      text: the document, of one in pieces its first piece.
    """
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())


def hold_out_tail(
    pieces: Iterable[Document], length: int, fraction: float
) -> Iterator[tuple[Document, bool]]:
    """Cuts one document in two: each piece of either, and whether it belongs to validation.

    The cut is at the line end that is nearest to `(1 - fraction) * length`, if there is one in
    that piece which changes neither side by more than half, and else right there. Neither side is
    empty if there are two characters.

    Args:
      pieces: the pieces of the document; a single one if it is not in pieces.
      length: characters of all pieces.
    """
    target = min(max(round((1 - fraction) * length), 1), length - 1)
    slack = min(target, length - target) // 2
    start = 0
    for piece in pieces:
        end = start + len(piece.text)
        if start < target < end:
            cut = _nearest_line_end(piece.text, target - start, slack)
            yield replace(piece, text=piece.text[:cut], continues=False), False
            yield replace(piece, text=piece.text[cut:]), True
        else:
            yield replace(piece, continues=piece.continues and end != target), end > target
        start = end


def _nearest_line_end(text: str, target: int, slack: int) -> int:
    """The index after the line end nearest to an index, at most `slack` away; else that index."""
    ends = (text.rfind("\n", 0, target) + 1, text.find("\n", target, len(text) - 1) + 1)
    near = [end for end in ends if end and abs(end - target) <= slack]
    return min(near, key=lambda end: abs(end - target), default=target)
