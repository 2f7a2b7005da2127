"""Which side of the validation split text is on.

Documents are held out by a hash of their text, so that identical ones are on the same side and a
document stays on its side when others are added. A corpus of one document holds out its tail.
"""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import replace

from hymba_jax.data.records import Document


def is_held_out(text: str, fraction: float) -> bool:
    """Whether a document belongs to validation: about this fraction of different ones does.

    It does if the first 64 bits of the BLAKE2b of its UTF-8, as a big-endian integer, are below
    `fraction * 2**64`; so what a smaller fraction holds out, a larger one does, too.

    Args:
      text: the document, of one in pieces its first piece.
    """
    return document_hash(text) < fraction * 2**64  # exact, as are Python's comparisons


def document_hash(text: str) -> int:
    """64 bits that tell a document from others.

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
