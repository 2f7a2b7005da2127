"""Tokens to text as they come."""

from collections.abc import Sequence

from hymba_jax.data.tokenizer import Tokenizer

# A character has up to 4 bytes, and a token at least one: what is decoded from the last 8 tokens
# on is the same text, but for its beginning, as if all of them were decoded.
CONTEXT = 8
REPLACEMENT = "\ufffd"  # what stands for bytes that are no text


class TextStream:
    """Turns tokens into text as they come: whole characters only, nothing of a stop string.

    The pieces together are what the tokenizer decodes all tokens to, after the prompt's text, up
    to the stop string that begins first. A piece comes as soon as no further token can change it.

    Attributes:
      stopped: a stop string has been met; neither it nor what follows is given.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt: Sequence[int], stop: Sequence[str] = ()
    ) -> None:
        self.stopped = False
        self._tokenizer = tokenizer
        self._stop = stop
        self._held = ""  # text that may be the beginning of a stop string
        self._silent = frozenset(tokenizer.special_tokens.values())
        self._bytes = _byte_tokens(tokenizer)
        # The last tokens, and how much of the text they decode to has been taken.
        self._window = self._tail([token for token in prompt if self._speaks(token)])
        self._taken = len(tokenizer.decode(self._window))

    def push(self, token: int) -> str:
        """The text that is certain with one more token; often none."""
        if self.stopped or not self._speaks(token):
            return ""
        self._window.append(token)
        if token in self._bytes:
            return ""
        text = self._tokenizer.decode(self._window)
        # Byte tokens aside, the beginning of a character decodes to one replacement at the end.
        certain = len(text) - (not self._bytes and text.endswith(REPLACEMENT))
        piece = text[self._taken : certain]
        left = len(text) - max(self._taken, certain)
        self._window = self._tail(self._window)
        self._taken = len(self._tokenizer.decode(self._window)) - left
        return self._before_stop(piece)

    def finish(self) -> str:
        """What was held back, when there are no more tokens."""
        if self.stopped:
            return ""
        piece = self._tokenizer.decode(self._window)[self._taken :]
        self._window, self._taken = [], 0
        return self._before_stop(piece, last=True)

    def _speaks(self, token: int) -> bool:
        """Whether the token is text: neither special nor beyond the vocabulary."""
        return token not in self._silent and self._tokenizer.model.id_to_token(token) is not None

    def _tail(self, tokens: list[int]) -> list[int]:
        """The last tokens, from before the run of byte tokens that they may end in."""
        run = 0
        while run < len(tokens) and tokens[-1 - run] in self._bytes:
            run += 1
        return tokens[-(CONTEXT + run) :]

    def _before_stop(self, piece: str, last: bool = False) -> str:
        """The held text with `piece`, as far as no stop string can be in it."""
        text = self._held + piece
        longest = max(map(len, self._stop), default=0)
        starts = range(max(0, len(text) - longest + 1), len(text))
        certain = len(text)
        if not last:
            open_ends = (i for i in starts if any(s.startswith(text[i:]) for s in self._stop))
            certain = min(open_ends, default=certain)
        found = min((i for s in self._stop if (i := text.find(s)) >= 0), default=len(text))
        self.stopped = found < len(text) and found <= certain
        certain = min(found, certain)
        self._held = "" if self.stopped else text[certain:]
        return text[:certain]


def _byte_tokens(tokenizer: Tokenizer) -> frozenset[int]:
    """Tokens that are one byte each, of which only a whole run can be decoded; often none.

    A tokenizer that has them (SentencePiece's way) falls back on them for rare characters. A run
    of them is text if all of it is valid UTF-8, else every byte becomes a replacement.
    """
    model = tokenizer.model
    numbers = [model.token_to_id(f"<0x{byte:02X}>") for byte in range(256)]
    probe = numbers[ord("A")]
    if probe is None or model.decode([probe]) != "A":
        return frozenset()
    return frozenset(number for number in numbers if number is not None)
