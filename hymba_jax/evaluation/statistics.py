"""Perplexity and bits per byte: means with errors, and over the position in the context."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hymba_jax.evaluation.perplexity import DocumentScores, PositionSums
from hymba_jax.types import Float

RESAMPLES = 1000
"""Of the bootstrap."""


@dataclass(frozen=True)
class Estimate:
    """A mean over all tokens or bytes.

    Attributes:
      value: None of nothing.
      standard_error: of documents like these, by bootstrap; None of fewer than two.
    """

    value: float | None
    standard_error: float | None


@dataclass(frozen=True)
class Totals:
    """Sums over some tokens.

    Attributes:
      nats: cross entropy.
      tokens: scored.
      text_bytes: UTF-8 bytes of these tokens; 0 of conversations, whose answers are scored with
        control tokens, which no text has.
    """

    nats: float
    tokens: int
    text_bytes: int

    @property
    def nats_per_token(self) -> float | None:
        return self.nats / self.tokens if self.tokens else None

    @property
    def perplexity(self) -> float | None:
        """Per token, exp of the mean cross entropy."""
        return perplexity(self.nats_per_token)

    @property
    def bits_per_byte(self) -> float | None:
        return self.nats / math.log(2) / self.text_bytes if self.text_bytes else None


def perplexity(nats_per_token: float | None) -> float | None:
    """exp of the cross entropy; infinite where a float has no room for it."""
    if nats_per_token is None:
        return None
    return math.exp(nats_per_token) if nats_per_token < 709 else math.inf


def document_totals(scores: DocumentScores) -> Totals:
    """The sums of a document, in double precision."""
    nats = float(scores.nats.sum(dtype=np.float64))
    return Totals(nats, len(scores.nats), int(scores.text_bytes.sum()))


def overall(documents: Sequence[Totals]) -> Totals:
    """The sums of all documents."""
    return Totals(
        math.fsum(each.nats for each in documents),
        sum(each.tokens for each in documents),
        sum(each.text_bytes for each in documents),
    )


@dataclass(frozen=True)
class Estimates:
    """Means over all documents with their errors; longer documents have more weight."""

    nats_per_token: Estimate
    perplexity: Estimate
    bits_per_byte: Estimate


def estimates(documents: Sequence[Totals], seed: int) -> Estimates:
    """The means of all documents, and how much they differ between resamples of the documents.

    Args:
      seed: of the bootstrap, which samples as many documents as there are, with replacement.
    """
    sums = np.array([(each.nats, each.tokens, each.text_bytes) for each in documents], np.float64)
    total = overall(documents)
    nats, tokens, text_bytes = _resampled(sums, seed).T
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        per_token, bits = nats / tokens, nats / math.log(2) / text_bytes
        return Estimates(
            Estimate(total.nats_per_token, _error(per_token)),
            Estimate(total.perplexity, _error(np.exp(per_token))),
            Estimate(total.bits_per_byte, _error(bits)),
        )


def _resampled(
    sums: Float[np.ndarray, "documents columns"], seed: int
) -> Float[np.ndarray, "resamples columns"]:
    count, rng = len(sums), np.random.default_rng(seed)
    if count < 2:
        return np.full((RESAMPLES, sums.shape[1]), np.nan)
    weights = np.full(count, 1 / count)
    return np.stack([rng.multinomial(count, weights) @ sums for _ in range(RESAMPLES)])


def _error(values: Float[np.ndarray, " resamples"]) -> float | None:
    """The standard deviation; None where it is not known, as resamples have nothing to divide."""
    return float(values.std(ddof=1)) if np.isfinite(values).all() else None


@dataclass(frozen=True)
class PositionSpan:
    """The tokens that were predicted from `start` to `stop - 1` tokens, at most a window."""

    start: int
    stop: int
    totals: Totals


def by_position(sums: PositionSums, span: int) -> list[PositionSpan]:
    """The curve over the position in the context, without spans that have no token.

    Args:
      span: positions of a point; the first is of the tokens predicted from 1 to `span` tokens.
    """
    window = len(sums.tokens)
    starts = np.arange(0, window, span)
    columns = (
        np.add.reduceat(column, starts) for column in (sums.nats, sums.tokens, sums.text_bytes)
    )
    return [
        PositionSpan(
            start + 1,
            min(start + span, window) + 1,
            Totals(float(nats), int(tokens), int(text_bytes)),
        )
        for start, nats, tokens, text_bytes in zip(starts.tolist(), *columns, strict=True)
        if tokens
    ]
