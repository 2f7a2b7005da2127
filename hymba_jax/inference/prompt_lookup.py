"""Drafts of what comes next, copied from where the text said the same before.

This is prompt lookup decoding: no second model drafts, but the text itself, which answers quote,
edit and repeat. What is drafted is verified by the model (`Engine.verify`), so that it costs time
at most, and is not tried where it does not pay.
"""

from collections.abc import Sequence

NGRAM = 3  # tokens that a text must have in common with an earlier place
VERIFICATION_STEPS = 4.0  # decoding steps that one verification takes, measured on CPUs
MAX_LOSS = 0.05  # of the decoding steps so far, that verifications may have cost in vain


class PromptLookup:
    """The tokens of one sequence, and where each n-gram of them was last.

    Whether it drafts depends on the tokens alone, not on measured times, so that a sequence is
    computed by the same programs every time.

    Args:
      prompt: the tokens so far.
    """

    def __init__(self, prompt: Sequence[int]) -> None:
        self._tokens: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}  # n-gram to the index of what follows it
        self._source: int | None = None  # what may come next is what comes there
        self._saved = VERIFICATION_STEPS  # decoding steps; the first verification is free
        self._append(prompt)

    def draft(self, limit: int) -> list[int]:
        """What the next tokens may be, at most `limit`; often nothing."""
        if self._source is None or self._saved < VERIFICATION_STEPS - 1:
            return []
        draft: list[int] = []
        for i in range(self._source, self._source + limit):  # may go on in what it has drafted
            known = i < len(self._tokens)
            draft.append(self._tokens[i] if known else draft[i - len(self._tokens)])
        return draft

    def decoded(self, tokens: Sequence[int]) -> None:
        """Tokens that were sampled one after another."""
        self._saved += MAX_LOSS * len(tokens)
        self._append(tokens)

    def verified(self, tokens: Sequence[int]) -> None:
        """Tokens that one verification sampled."""
        self._saved += len(tokens) - VERIFICATION_STEPS
        self._append(tokens)

    def _append(self, tokens: Sequence[int]) -> None:
        for token in tokens:
            self._tokens.append(token)
            ngram = tuple(self._tokens[-NGRAM:])
            self._source = self._after.get(ngram)
            self._after[ngram] = len(self._tokens)
