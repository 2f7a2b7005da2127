"""Documents to one flat stream of tokens, and the stream to windows for training.

Each document becomes `<s> tokens </s>`, without `<s>` where the tokenizer has none; the documents
follow one another in order. Window i covers the `sequence_length + 1` tokens from
`i * sequence_length`: neighbours share one token, the last target of one and the first input of
the next, so that every token but the stream's first is a target exactly once.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from hymba_jax.data.batch import Batch, make_row
from hymba_jax.data.records import Document
from hymba_jax.data.token_store import TokenStore
from hymba_jax.data.tokenizer import Tokenizer
from hymba_jax.types import UInt

# Characters tokenized at once: enough for all cores, few enough to show progress and save memory.
_SLICE = 1 << 21

type Progress = Callable[[int, int], None]
"""Called with the characters done and the characters in all."""


def pack(
    documents: Sequence[Document], tokenizer: Tokenizer, on_progress: Progress | None = None
) -> list[UInt[np.ndarray, " _"]]:
    """Each document as `<s> tokens </s>`; put end to end, they are the stream.

    uint16 where the vocabulary fits and uint32 else.
    """
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
    total = sum(len(document.text) for document in documents)
    done = 0
    tokenized = []
    for texts in _slices(documents):
        for ids in tokenizer.encode_batch(texts):
            tokenized.append(np.array([*tokenizer.bos_ids, *ids, tokenizer.eos_id], dtype))
        done += sum(map(len, texts))
        if on_progress is not None:
            on_progress(done, total)
    return tokenized


def _slices(documents: Sequence[Document]) -> Iterator[list[str]]:
    texts: list[str] = []
    size = 0
    for document in documents:
        texts.append(document.text)
        size += len(document.text)
        if size >= _SLICE:
            yield texts
            texts, size = [], 0
    if texts:
        yield texts


class Windows:
    """The whole windows of a stream, a data source for Grain; tokens after the last are left out.

    Record i is the row of a batch that window i makes.
    """

    def __init__(self, tokens: TokenStore, sequence_length: int) -> None:
        self._tokens = tokens
        self._sequence_length = sequence_length

    def __len__(self) -> int:
        return (self._tokens.num_tokens - 1) // self._sequence_length

    def __getitem__(self, index: int) -> Batch:
        return make_row(window(self._tokens, index, self._sequence_length), self._sequence_length)


def window(tokens: TokenStore, index: int, sequence_length: int) -> UInt[np.ndarray, " window"]:
    """The tokens of a window; fewer at the end of the stream."""
    start = index * sequence_length
    return tokens.read(start, min(start + sequence_length + 1, tokens.num_tokens))
