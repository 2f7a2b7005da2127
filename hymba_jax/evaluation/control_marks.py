"""Control tokens of a chat template, marked in plain strings.

The harness handles conversations as strings: it joins, caches and stores them. A mark on both
sides of a control token that the template wrote survives that, and tells it from text that only
looks like one. Two marks begin every conversation, whose template may write no control token.
"""

from hymba_jax.tokenizer import Tokenizer
from hymba_jax.tokenizer.control_tokens import TEMPLATE, USER
from hymba_jax.tokenizer.traced_text import Traced, origins

MARK = "\ufdd0"
"""A noncharacter, which Unicode reserves for use inside programs."""


def mark(tokenizer: Tokenizer, text: Traced) -> str:
    """A rendered conversation as a string, with marks in place of the origins of characters."""
    pieces, done = ["", ""], 0
    for match in tokenizer.control.find(text, origins(text)):
        pieces += [
            _plain(text, done, match.start),
            str.__getitem__(text, slice(match.start, match.end)),
        ]
        done = match.end
    return MARK.join([*pieces, _plain(text, done, len(text))])


def is_conversation(text: str) -> bool:
    """Whether a chat template has written it."""
    return MARK in text


def encode_marked(tokenizer: Tokenizer, text: str) -> list[int]:
    """Token ids of a string; without marks those of ordinary text."""
    pieces = text.split(MARK)
    written = bytes([USER, TEMPLATE])
    parts = [written[i % 2 : i % 2 + 1] * len(piece) for i, piece in enumerate(pieces)]
    return tokenizer.encode_traced("".join(pieces), b"".join(parts))


def _plain(text: Traced, start: int, stop: int) -> str:
    """Part of a conversation without marks that a user wrote."""
    return str.__getitem__(text, slice(start, stop)).replace(MARK, "")
