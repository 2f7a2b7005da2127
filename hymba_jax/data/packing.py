"""Documents to one flat stream of tokens, and the stream to windows for training.

Each document becomes `<s> tokens </s>`, without `<s>` where the tokenizer has none; the documents
follow one another in order. Window i covers the `sequence_length + 1` tokens from
`i * sequence_length`: neighbours share one token, the last target of one and the first input of
the next, so that every token but the stream's first is a target exactly once.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from hymba_jax.data.sources import Document
from hymba_jax.data.tokenizer import Tokenizer
from hymba_jax.types import Int, UInt

IGNORED_TARGET = -100
"""Target of a position that no loss counts."""

# Characters tokenized at once: enough for all cores, few enough to show progress and save memory.
_SLICE = 1 << 21

type Progress = Callable[[int, int], None]
"""Called with the characters done and the characters in all."""


def pack(
    documents: Sequence[Document], tokenizer: Tokenizer, on_progress: Progress | None = None
) -> list[UInt[np.ndarray, " _"]]:
    """Each document as `<s> tokens </s>`: pieces that, put end to end, are the stream.

    uint16 where the vocabulary fits and uint32 else.
    """
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
    total = sum(len(document.text) for document in documents)
    done = 0
    pieces = []
    for texts in _slices(documents):
        for ids in tokenizer.encode_batch(texts):
            pieces.append(np.array([*tokenizer.bos_ids, *ids, tokenizer.eos_id], dtype))
        done += sum(map(len, texts))
        if on_progress is not None:
            on_progress(done, total)
    return pieces


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

    Record i is a dictionary of `inputs` and `targets`, (sequence_length,) int32 each, the targets
    one token ahead of the inputs.
    """

    def __init__(self, tokens: UInt[np.ndarray, " stream"], sequence_length: int) -> None:
        self._tokens = tokens
        self._sequence_length = sequence_length

    def __len__(self) -> int:
        return (len(self._tokens) - 1) // self._sequence_length

    def __getitem__(self, index: int) -> dict[str, Int[np.ndarray, " length"]]:
        start = index * self._sequence_length
        window = self._tokens[start : start + self._sequence_length + 1].astype(np.int32)
        return {"inputs": window[:-1], "targets": window[1:]}
