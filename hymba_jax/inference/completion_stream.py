"""Sampled tokens to the deltas of a completion."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np

from hymba_jax.config.sampling import SamplingConfig
from hymba_jax.errors import HymbaError
from hymba_jax.inference.batch_state import NO_TOKEN, NOT_FINITE
from hymba_jax.inference.text_stream import TextStream
from hymba_jax.tokenizer import Tokenizer
from hymba_jax.types import Float, Int

type FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class PromptScores:
    """How likely each token of a prompt is, given those before it.

    Attributes:
      tokens: of the prompt.
      log_probs: natural, one for each of `tokens` but the first.
      alternatives: as in `Delta`, for each of `tokens` but the first.
    """

    tokens: list[int]
    log_probs: list[float]
    alternatives: list[list[tuple[int, float]]] = field(default_factory=list)


class EndToken(NamedTuple):
    """The stop token that ended a completion, and is no part of it.

    Attributes:
      log_prob, alternatives, offset: as in `Delta`.
    """

    token: int
    log_prob: float
    alternatives: list[tuple[int, float]]
    offset: int


@dataclass(frozen=True)
class Delta:
    """What is new of one completion.

    Attributes:
      index: of the prompt.
      sample: which of its completions.
      tokens, log_probs: as in `Completion`. Like text, tokens are held back while they may belong
        to a stop string.
      finish_reason: as in `Completion`; None while there is more to come.
      context_full: as in `Completion`.
      alternatives: for each of `tokens` the likeliest tokens with their log-probabilities, the
        likeliest first, if asked for.
      offsets: where in the completion's text each of `tokens` begins.
      stop_string: that ended it, if one did.
      prompt: its scores, if asked for, in the first delta.
      end: the token that ended it, if one did, in the last delta.
    """

    index: int
    sample: int
    text: str
    tokens: list[int]
    log_probs: list[float]
    finish_reason: FinishReason | None
    context_full: bool = False
    alternatives: list[list[tuple[int, float]]] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    stop_string: str | None = None
    prompt: PromptScores | None = None
    end: EndToken | None = None


class CompletionStream:
    """The deltas of one row, until it is finished.

    Args:
      context: tokens that prompt and completion may have together.
      index, sample: as in `Delta`.
      name: of the prompt, for messages.
      alternatives: how many of the likeliest tokens come with each sampled one.

    Attributes:
      max_new_tokens: tokens that may be sampled.
      finished: no more tokens belong to it.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: Sequence[int],
        config: SamplingConfig,
        context: int,
        *,
        index: int = 0,
        sample: int = 0,
        name: str = "the prompt",
        alternatives: int = 0,
    ):
        room = context - len(prompt)
        self.max_new_tokens = min(config.max_new_tokens, room)
        self.finished = False
        self._shortened = room < config.max_new_tokens
        self._place = index, sample
        self._name, self._length = name, len(prompt)
        self._stream = TextStream(tokenizer, prompt, config.stop)
        self._num_alternatives = alternatives
        self._alternatives: list[list[tuple[int, float]]] = []
        self._sampled: list[tuple[int, float]] = []  # tokens with their log-probabilities
        self._num_emitted = 0  # how many of them

    @property
    def num_tokens_left(self) -> int:
        """Tokens that may still be sampled."""
        return self.max_new_tokens - len(self._sampled)

    def push(
        self,
        tokens: Int[np.ndarray, " steps"],
        log_probs: Float[np.ndarray, " steps"],
        stopped: np.bool,
        top_tokens: Int[np.ndarray, "steps alternatives"],
        top_log_probs: Float[np.ndarray, "steps alternatives"],
        ends: Int[np.ndarray, " steps"],
    ) -> Delta:
        """The delta that is final after these tokens, up to a stop string.

        Args: a row of `engine.SampledTokens`.

        Raises:
          HymbaError: the model's logits are not finite.
        """
        text, end = "", None
        for i, (token, log_prob) in enumerate(
            zip(tokens.tolist(), log_probs.tolist(), strict=True)
        ):
            if token == NOT_FINITE and not self._stream.stopped:
                raise _not_finite(self._name, self._length + len(self._sampled) - 1)
            pairs: list[tuple[int, float]] = []
            if self._num_alternatives:
                pairs = [*zip(top_tokens[i].tolist(), top_log_probs[i].tolist(), strict=True)]
            top = pairs[: self._num_alternatives]
            if token == NO_TOKEN or self._stream.stopped:
                if ends[i] != NO_TOKEN and not self._stream.stopped:
                    end = (int(ends[i]), log_prob, top)
                break
            self._sampled.append((token, log_prob))
            if self._num_alternatives:
                self._alternatives.append(top)
            text += self._stream.push(token)
        self.finished = bool(stopped) or self._stream.stopped
        reason: FinishReason | None = None
        if self.finished:
            text += self._stream.finish()
            ended = self._stream.stopped or len(self._sampled) < self.max_new_tokens
            reason = "stop" if ended else "length"
        new = slice(self._num_emitted, max(self._num_emitted, self._stream.num_final_tokens))
        self._num_emitted = new.stop
        return Delta(
            *self._place,
            text,
            [token for token, _ in self._sampled[new]],
            [log_prob for _, log_prob in self._sampled[new]],
            reason,
            context_full=reason == "length" and self._shortened,
            alternatives=self._alternatives[new],
            offsets=self._stream.offsets[new],
            stop_string=self._stream.stop_string,
            end=EndToken(*end, self._stream.num_characters) if end else None,
        )


def check_finite(name: str, log_probs: Float[np.ndarray, " _"], start: int = 0) -> None:
    """Raises HymbaError if the logits that log-probabilities are of were not finite.

    Args:
      name: of their sequence, for the message.
      log_probs: as of `engine.TokenScores`.
      start: the position whose logits the first one is of.
    """
    is_nan = np.isnan(log_probs)
    if is_nan.any():
        raise _not_finite(name, start + int(is_nan.argmax()))


def _not_finite(name: str, position: int) -> HymbaError:
    return HymbaError(
        f"{name}: the model's logits at position {position} are not finite: its parameters may be "
        "damaged, or their values too large for the dtype"
    )
