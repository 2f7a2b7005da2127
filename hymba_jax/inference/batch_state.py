"""What prefill, insert and decode pass to each other: arrays, a row for each sequence."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from hymba_jax.config.sampling import SamplingConfig
from hymba_jax.inference.sampling import Sampler
from hymba_jax.model.state import ModelState
from hymba_jax.types import Array, Bool, Float, Int

NO_TOKEN = -1
NOT_FINITE = -2  # marks a row whose logits are NaN or infinite


class Request(NamedTuple):
    """One sequence to sample.

    Attributes:
      prompt: its tokens, for the repetition penalty.
      sampling: how tokens are sampled; its stop criteria and max_new_tokens are ignored.
      sample: index among the prompt's samples.
      max_new_tokens: maximum number of tokens.
      stop_tokens: tokens that end it and are not part of it.
      logit_bias: tokens with what is added to their logits.
      alternatives: whether the likeliest tokens are reported beside each sampled one.
      mask: tokens that its first one may be; all if absent. See `Engine.set_bias` for the others.
    """

    prompt: Sequence[int]
    sampling: SamplingConfig
    sample: int
    max_new_tokens: int
    stop_tokens: Sequence[int] = ()
    logit_bias: Sequence[tuple[int, float]] = ()
    alternatives: bool = False
    mask: Bool[np.ndarray, "vocab"] | None = None

    def bias(self, vocab_size: int) -> Float[np.ndarray, " vocab"]:
        """What is added to the logits of each token: its logit bias, -inf where masked."""
        bias = np.zeros(vocab_size, np.float32)
        for token, value in self.logit_bias:
            bias[token] = value
        return bias if self.mask is None else np.where(self.mask, bias, np.float32(-np.inf))


class StopCriteria(NamedTuple):
    """When rows stop: after so many tokens, or at one of these (padded with NO_TOKEN)."""

    max_new_tokens: Int[Array, "batch"]
    stop_tokens: Int[Array, "batch stop_tokens"]


class SampledTokens(NamedTuple):
    """Sampled tokens by row and step, with log-probabilities, and which rows have stopped.

    NO_TOKEN after a row has stopped, NOT_FINITE if its logits were not finite. The likeliest
    tokens are there, as of `sampling.likeliest`, if any row asks for alternatives. A stop token,
    which is none of `tokens`, is in `ends` at the step in which it ended its row.
    """

    tokens: Int[Array, "batch steps"]
    log_probs: Float[Array, "batch steps"]
    stopped: Bool[Array, "batch"]
    top_tokens: Int[Array, "batch steps alternatives"]
    top_log_probs: Float[Array, "batch steps alternatives"]
    ends: Int[Array, "batch steps"]

    def with_step(self, step: Int[Array, ""], new: "SampledTokens") -> "SampledTokens":
        """These with the tokens of one more step."""
        steps = {
            name: array.at[:, step].set(getattr(new, name)[:, 0])
            for name, array in self._asdict().items()
            if name != "stopped"
        }
        return SampledTokens(**steps, stopped=new.stopped)


class DecodeState(NamedTuple):
    """A running batch.

    Attributes:
      token: the last sampled token of each row, not in the cache yet.
      num_sampled: tokens sampled so far.
      stopped: rows that are complete; their cache no longer changes.
      seen: the tokens in each sequence, for the repetition penalty.
      counts: how often each token was sampled, for the frequency and the presence penalty.
      bias: added to the logits.
      alternatives: rows that ask for the likeliest tokens beside each sampled one.
    """

    cache: ModelState
    token: Int[Array, "batch"]
    num_sampled: Int[Array, "batch"]
    stopped: Bool[Array, "batch"]
    seen: Bool[Array, "batch vocab"]
    counts: Int[Array, "batch vocab"]
    bias: Float[Array, "batch vocab"]
    alternatives: Bool[Array, "batch"]
    sampler: Sampler
    stop: StopCriteria


class Prefilled(NamedTuple):
    """A batch of prefilled prompts.

    Attributes:
      last_hidden: the last layer's output at the last token of each row.
    """

    cache: ModelState
    last_hidden: Float[Array, "batch hidden"]


class TokenScores(NamedTuple):
    """How likely each token of a sequence but the first is, given those before it.

    Attributes:
      log_probs: NaN where the model's logits are not all finite.
      is_likeliest: whether no token has a larger logit; of several such, it is the first.
      top_tokens, top_log_probs: the MAX_ALTERNATIVES likeliest tokens, the likeliest first; zeros
        unless they are asked for.
    """

    log_probs: Float[np.ndarray, " targets"]
    is_likeliest: Bool[np.ndarray, " targets"]
    top_tokens: Int[np.ndarray, "targets alternatives"]
    top_log_probs: Float[np.ndarray, "targets alternatives"]


class ChunkScores(NamedTuple):
    """`TokenScores` of one chunk of each sequence of a batch, on the device."""

    log_probs: Float[Array, "batch length"]
    is_likeliest: Bool[Array, "batch length"]
    top_tokens: Int[Array, "batch length alternatives"]
    top_log_probs: Float[Array, "batch length alternatives"]


class PaddedChunk(NamedTuple):
    """A chunk of each prompt of a batch, padded on the right."""

    tokens: Int[np.ndarray | Array, "batch length"]
    lengths: Int[np.ndarray | Array, "batch"]
