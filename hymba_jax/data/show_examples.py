"""Tokenized documents as a person reads them, with what the loss is on."""

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
from rich.text import Text

from hymba_jax.data.token_store import TokenStore
from hymba_jax.data.tokenized import TokenizedCorpus
from hymba_jax.tokenizer import Tokenizer

BRACKETS = "\N{MATHEMATICAL LEFT WHITE SQUARE BRACKET}\N{MATHEMATICAL RIGHT WHITE SQUARE BRACKET}"
"""Around what the loss is on, which is in color, too."""

_STYLE = "bold green"
_SHOWN = 4096  # tokens of a document at most


def examples(corpus: TokenizedCorpus, count: int) -> Iterator[Text]:
    """The first documents, or pairs, of a corpus, those for training before those for validation.

    Control tokens are written by their names.
    """
    for side in ("train", "validation"):
        store: TokenStore | None = getattr(corpus, side)
        if store is None or not count:
            continue
        sides = ("",) if corpus.format != "preference" else (" chosen", " rejected")
        borders = _borders(store, count * len(sides))
        for index, (start, stop) in enumerate(pairwise(borders)):
            name = f"{side} {index // len(sides) + 1}{sides[index % len(sides)]}"
            yield _example(store, start, stop, corpus.tokenizer, name)
        count -= (len(borders) - 1) // len(sides)


def _borders(store: TokenStore, count: int) -> list[int]:
    """The starts of the first documents, and the end of the last: of `count`, or of all."""
    stop = _SHOWN
    # In growing ranges, as a corpus may have more documents than fit in memory.
    while len(starts := store.document_starts(0, min(stop, store.num_tokens))) <= count:
        if stop >= store.num_tokens:
            return [*starts.tolist(), store.num_tokens]
        stop *= 2
    return starts[: count + 1].tolist()


def _example(store: TokenStore, start: int, stop: int, tokenizer: Tokenizer, name: str) -> Text:
    count, stop = stop - start, min(stop, start + _SHOWN)
    ids, mask = store.read(start, stop).tolist(), store.read_mask(start, stop)
    mask[0] = False  # nothing comes before it that would predict it
    borders = [0, *(np.flatnonzero(np.diff(mask)) + 1).tolist(), len(ids)]
    more = f", here the first {_SHOWN:,}" if count > _SHOWN else ""
    text = Text(f"--- {name}: {count:,} tokens{more}, the loss is on {int(mask.sum()):,}\n")
    shown = ""
    for first, last in pairwise(borders):
        # Decoded from the start: what a token stands for depends on those before it.
        decoded = tokenizer.model.decode(ids[:last], skip_special_tokens=False)
        part, shown = decoded[len(shown) :], decoded
        if mask[first]:
            text.append(f"{BRACKETS[0]}{part}{BRACKETS[1]}", _STYLE)
        else:
            text.append(part)
    return text
