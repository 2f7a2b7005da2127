"""Documents as tokens to score, each with the bytes of text that it stands for."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from hymba_jax.data.records import Document
from hymba_jax.tokenizer import Tokenizer
from hymba_jax.tokenizer.answers import encode_answers
from hymba_jax.tokenizer.control_tokens import USER
from hymba_jax.types import Bool, Int


@dataclass(frozen=True, eq=False)
class EncodedDocument:
    """A document; text is behind the beginning-of-sequence token if the tokenizer has one.

    Attributes:
      name: that of its record.
      tokens: ids.
      text_bytes: UTF-8 bytes of each token. A character whose bytes are in several tokens counts
        for the first of them; tokens of a conversation have none.
      is_scored: whether the token is to be predicted: not the first, and of a conversation only
        answers with what ends them.
    """

    name: str
    tokens: Int[np.ndarray, " tokens"]
    text_bytes: Int[np.ndarray, " tokens"]
    is_scored: Bool[np.ndarray, " tokens"]


def encode_documents(
    documents: Iterable[Document], tokenizer: Tokenizer
) -> Iterator[EncodedDocument]:
    """The documents, as they are trained on but without the end-of-sequence token after texts.

    Text is ordinary text: names of control tokens in it are none. The pieces of a long document
    are tokenized one by one and joined.

    Raises:
      HymbaError: the tokenizer cannot encode a document.
    """
    pieces: list[EncodedDocument] = []
    for document in documents:
        pieces.append(_encode(document, tokenizer))
        if not document.continues:
            yield _join(pieces, [] if document.chat else tokenizer.bos_ids)
            pieces = []


def _encode(document: Document, tokenizer: Tokenizer) -> EncodedDocument:
    if chat := document.chat:
        ids, is_answer = encode_answers(tokenizer, chat)
        end = [tokenizer.eos_id] * chat.takes_eos
        tokens = np.array([*ids, *end], np.int32)
        is_scored = np.append(is_answer, np.ones(len(end), bool))
        return EncodedDocument(document.name, tokens, np.zeros(len(tokens), np.int64), is_scored)
    text = document.text
    ids, spans = tokenizer.encode_with_spans(text, bytes([USER]) * len(text))
    text_bytes = _token_bytes(text, spans)
    return EncodedDocument(
        document.name, np.array(ids, np.int32), text_bytes, np.ones(len(ids), bool)
    )


def _token_bytes(text: str, spans: Int[np.ndarray, "tokens 2"]) -> Int[np.ndarray, " tokens"]:
    """UTF-8 bytes of each token, all of the text's together."""
    characters = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    widths = 1 + sum((characters >= first).astype(np.int64) for first in (0x80, 0x800, 0x10000))
    ends = np.concatenate([[0], np.cumsum(widths)])
    # A normalizer may have removed characters: they belong to the token after them, or the last.
    reached = np.maximum.accumulate(ends[spans[:, 1]])
    reached[-1:] = ends[-1]
    return np.diff(reached, prepend=0)


def _join(pieces: list[EncodedDocument], bos_ids: list[int]) -> EncodedDocument:
    before = len(bos_ids)
    begin = EncodedDocument(
        "", np.array(bos_ids, np.int32), np.zeros(before, np.int64), np.zeros(before, bool)
    )
    pieces = [begin, *pieces]
    is_scored = np.concatenate([piece.is_scored for piece in pieces])
    is_scored[:1] = False
    return EncodedDocument(
        pieces[-1].name,
        np.concatenate([piece.tokens for piece in pieces]),
        np.concatenate([piece.text_bytes for piece in pieces]),
        is_scored,
    )
