"""Tokens to text as they come."""

import itertools
from collections.abc import Sequence

from hymba_jax.tokenizer import REPLACEMENT, Tokenizer

# A character has up to 4 bytes, and a token at least one: what is decoded from the last 8 tokens
# on is the same text, but for its beginning, as if all of them were decoded.
CONTEXT = 8


class TextStream:
    """Turns tokens into text as they come: complete characters only, without stop strings.

    The deltas together are what the tokenizer decodes all tokens to, after the prompt's text, up
    to the stop string that begins first. A delta is emitted as soon as no later token can change
    it.

    Attributes:
      stop_string: that was found; neither it nor what follows is emitted. None if there is none.
      offsets: where in the text each token begins, final for the first `num_final_tokens`.
      num_final_tokens: number of leading tokens that are certainly part of the completion: those
        whose text begins before a stop string, or before what may become one.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt: Sequence[int], stop: Sequence[str] = ()
    ) -> None:
        self.stop_string: str | None = None
        self.offsets: list[int] = []
        self.num_final_tokens = 0
        self._num_emitted = self._num_final = 0  # characters emitted, and those or held
        self._run: list[int] = []  # which tokens are the byte tokens that cannot be decoded yet
        self._tokenizer = tokenizer
        self._stop = stop
        self._held = ""  # text that may be the beginning of a stop string
        self._bytes = tokenizer.byte_tokens
        # The last tokens, the text that they decode to, and how much of it has been taken.
        self._window = self._tail([token for token in prompt if token in tokenizer.text_tokens])
        self._text = tokenizer.decode(self._window)
        self._taken = len(self._text)

    @property
    def stopped(self) -> bool:
        """Whether a stop string was found."""
        return self.stop_string is not None

    @property
    def num_characters(self) -> int:
        """Of the text so far, with what is held back."""
        return self._num_final

    def push(self, token: int) -> str:
        """The new text that is final after one more token; often empty."""
        if self.stopped:
            return ""
        self.offsets.append(self._num_final)
        if token not in self._tokenizer.text_tokens:
            return ""
        self._window.append(token)
        if token in self._bytes:
            self._run.append(len(self.offsets) - 1)
            return ""
        text = self._tokenizer.decode(self._window)
        self.offsets[-1] += self._locate_run(self._window[:-1])
        if not self._bytes and len(text) > len(self._text) and text.startswith(self._text):
            # What stands for the beginning of a character stays: this token is behind it.
            self.offsets[-1] += len(self._text) - self._taken
        # Byte tokens aside, the beginning of a character decodes to one replacement at the end.
        certain = len(text) - (not self._bytes and text.endswith(REPLACEMENT))
        delta = text[self._taken : certain]
        left = len(text) - max(self._taken, certain)
        tail = self._tail(self._window)
        if len(self._window) > 2 * len(tail):  # now and then: decoding takes time
            self._window, text = tail, self._tokenizer.decode(tail)
        self._text, self._taken = text, len(text) - left
        return self._before_stop(delta)

    def finish(self) -> str:
        """What was held back, when there are no more tokens."""
        if self.stopped:
            return ""
        self._locate_run(self._window)
        delta = self._tokenizer.decode(self._window)[self._taken :]
        self._window, self._text, self._taken = [], "", 0
        return self._before_stop(delta, last=True)

    def _tail(self, tokens: list[int]) -> list[int]:
        """The last tokens, from before the run of byte tokens that they may end in."""
        return tokens[-(CONTEXT + len(self._bytes_at_end(tokens))) :]

    def _bytes_at_end(self, tokens: list[int]) -> bytes:
        """The bytes of the run of byte tokens that these end in."""
        run = itertools.takewhile(lambda token: token in self._bytes, reversed(tokens))
        return bytes(self._bytes[token] for token in run)[::-1]

    def _locate_run(self, window: list[int]) -> int:
        """Finds where each byte token of a run that has ended begins, and the run's characters."""
        run = self._bytes_at_end(window)
        try:
            run.decode()
        except UnicodeDecodeError:
            lengths = [*range(len(run) + 1)]  # a replacement for each byte
        else:
            lengths = [len(run[:i].decode(errors="ignore")) for i in range(len(run) + 1)]
        first = len(run) - len(self._run)  # those before it are the prompt's
        for token, length in zip(self._run, lengths[first:], strict=False):
            self.offsets[token] += length - lengths[first]
        self._run = []
        return lengths[-1] - lengths[first]

    def _before_stop(self, delta: str, last: bool = False) -> str:
        """The held text with `delta`, as far as no stop string can be in it."""
        text = self._held + delta
        longest = max(map(len, self._stop), default=0)
        starts = range(max(0, len(text) - longest + 1), len(text))
        certain = len(text)
        if not last:
            open_ends = (i for i in starts if any(s.startswith(text[i:]) for s in self._stop))
            certain = next(open_ends, certain)  # the first; to look at them all is quadratic
        matches = ((i, s) for s in self._stop if (i := text.find(s)) >= 0)
        found, string = min(matches, default=(len(text), None))
        self.stop_string = string if found <= certain else None
        certain = min(found, certain)
        self._held = "" if self.stopped else text[certain:]
        self._num_emitted += certain
        self._num_final = self._num_emitted + len(self._held)
        while (
            self.num_final_tokens < len(self.offsets)
            and self.offsets[self.num_final_tokens] < self._num_emitted
        ):
            self.num_final_tokens += 1
        if last and not self.stopped:
            self.num_final_tokens = len(self.offsets)
        return text[:certain]
