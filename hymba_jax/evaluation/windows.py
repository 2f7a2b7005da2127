"""Which part of a long sequence each of its tokens is predicted from."""

from collections.abc import Iterator
from typing import NamedTuple


class Window(NamedTuple):
    """Tokens that a model reads at once, and which of them it is scored on.

    Attributes:
      start, stop: the tokens `start` to `stop - 1` of the sequence are given; the last of them is
        predicted only.
      first: the tokens `first` to `stop - 1` are scored.
    """

    start: int
    stop: int
    first: int


def windows(num_tokens: int, window: int, stride: int) -> Iterator[Window]:
    """Windows that together score each token of a sequence but the first, once.

    The first window is the sequence's beginning; each later one scores the `stride` tokens that
    follow, the last one what is left. A token is predicted from all tokens before it, or from at
    least `window - stride + 1` and at most `window` of them.

    Args:
      window: tokens that are given before the last one.
      stride: tokens between windows, `window` at most.
    """
    first, stop = 1, min(num_tokens, window + 1)
    while first < stop:
        yield Window(max(0, stop - window - 1), stop, first)
        first, stop = stop, min(num_tokens, stop + stride)
