"""How well a model predicts documents: the cross entropy of each of their tokens."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import batched
from typing import NamedTuple

import numpy as np

from hymba_jax.errors import HymbaError
from hymba_jax.evaluation.documents import EncodedDocument
from hymba_jax.evaluation.replicas import Replicas
from hymba_jax.evaluation.windows import Window, windows
from hymba_jax.inference import LanguageModel
from hymba_jax.types import Float, Int


@dataclass(frozen=True, eq=False)
class DocumentScores:
    """The scored tokens of one document.

    Attributes:
      name: of the document.
      nats: cross entropy of each.
      text_bytes: UTF-8 bytes of each.
    """

    name: str
    nats: Float[np.ndarray, " tokens"]
    text_bytes: Int[np.ndarray, " tokens"]


@dataclass(frozen=True, eq=False)
class PositionSums:
    """Sums over all tokens of all windows, also those that are scored in the window before.

    So every window counts at every position; the scores above have most tokens of a long document
    from the ends of windows. Entry i is of the tokens that were predicted from i + 1 tokens.

    Attributes:
      nats: cross entropy.
      tokens: how many.
      text_bytes: their UTF-8 bytes.
    """

    nats: Float[np.ndarray, " window"]
    tokens: Int[np.ndarray, " window"]
    text_bytes: Int[np.ndarray, " window"]


class _Job(NamedTuple):
    document: int
    window: Window


def score_documents(
    model: LanguageModel,
    documents: Sequence[EncodedDocument],
    window: int,
    stride: int,
    advance: Callable[[int, int], object] = lambda done, total: None,
    replicas: Replicas | None = None,
) -> tuple[list[DocumentScores], PositionSums]:
    """The scores of each document from its own start, long ones in windows (`windows`).

    Windows of about the same length are computed together, so little is padding. What is computed
    beside a window changes its scores by float32 rounding at most; the number of devices does not.

    Args:
      window, stride: of long documents, in tokens.
      advance: called with how many tokens are done, of all that are computed.
      replicas: what computes them; the model where it is if absent.

    Raises:
      HymbaError: too little memory, or the model's logits are not finite.
    """
    jobs = [
        _Job(i, each)
        for i, document in enumerate(documents)
        for each in windows(len(document.tokens), window, stride)
        if document.is_scored[each.first : each.stop].any()
    ]
    jobs.sort(key=lambda job: job.window.stop - job.window.start, reverse=True)
    total, done = sum(job.window.stop - job.window.start for job in jobs), 0
    nats = [np.zeros(len(document.tokens), np.float32) for document in documents]
    sums = PositionSums(np.zeros(window), np.zeros(window, int), np.zeros(window, int))
    if jobs:
        longest = jobs[0].window.stop - jobs[0].window.start - 1
        model.engine.check_memory(min(len(jobs), model.batch_size), longest)

    def score(model: LanguageModel, batch: Sequence[_Job]) -> list[list[float]]:
        """The log-probabilities of each window's tokens but the first."""
        windows = [documents[i].tokens[w.start : w.stop].tolist() for i, w in batch]
        return [each.log_probs.tolist() for each in model.engine.score(windows)]

    replicas = replicas or Replicas(model, [model.engine.device])
    batches = [*batched(jobs, model.batch_size)]
    for batch, scored in zip(batches, replicas.map(score, batches), strict=True):
        for (i, each), values in zip(batch, scored, strict=True):
            log_probs = np.array(values, np.float32)
            _check_finite(documents[i], each, log_probs)
            nats[i][each.first : each.stop] = -log_probs[each.first - each.start - 1 :]
            _add(sums, documents[i], each, -log_probs)
            done += each.stop - each.start
        advance(done, total)
    scores = [
        DocumentScores(
            document.name, nats[i][document.is_scored], document.text_bytes[document.is_scored]
        )
        for i, document in enumerate(documents)
    ]
    return scores, sums


def _add(
    sums: PositionSums, document: EncodedDocument, window: Window, nats: Float[np.ndarray, " _"]
) -> None:
    """Adds the tokens of a window to the sums by position."""
    predicted = slice(window.start + 1, window.stop)
    is_scored, here = document.is_scored[predicted], slice(len(nats))
    sums.nats[here] += np.where(is_scored, nats, 0)
    sums.tokens[here] += is_scored
    sums.text_bytes[here] += np.where(is_scored, document.text_bytes[predicted], 0)


def _check_finite(
    document: EncodedDocument, window: Window, log_probs: Float[np.ndarray, " _"]
) -> None:
    is_nan = np.isnan(log_probs)
    if is_nan.any():
        token = window.start + 1 + int(is_nan.argmax())
        raise HymbaError(
            f"{document.name}: the model's logits for token {token} are not finite: its "
            "parameters may be damaged, or their values too large for the dtype"
        )
