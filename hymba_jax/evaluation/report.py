"""The results of a perplexity evaluation: as JSON, as a table and as an image."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from hymba_jax.evaluation.perplexity import DocumentScores, PositionSums
from hymba_jax.evaluation.statistics import (
    Estimate,
    Estimates,
    PositionSpan,
    Totals,
    by_position,
    document_totals,
    estimates,
    overall,
)
from hymba_jax.figures import make_figure, save_figure

MEASURES = {
    "nats_per_token": "nats per token",
    "perplexity": "perplexity per token",
    "bits_per_byte": "bits per byte",
}
_POINTS = 16  # of the curve, at most, unless told otherwise


@dataclass(frozen=True)
class PerplexityReport:
    """What documents cost a model.

    Attributes:
      about: how it was measured: model, data, window and so on.
      names: of the documents.
      documents: their sums.
      total: those of all of them.
      means: over all tokens, or bytes, with standard errors.
      curve: over the position in the context, of all windows (`PositionSums`).
    """

    about: dict[str, Any]
    names: tuple[str, ...]
    documents: tuple[Totals, ...]
    total: Totals
    means: Estimates
    curve: tuple[PositionSpan, ...]

    def as_json(self) -> dict[str, Any]:
        """The report as a JSON value; what is infinite or not known is null."""
        return {
            **self.about,
            "documents": len(self.documents),
            "tokens": self.total.tokens,
            "text_bytes": self.total.text_bytes,
            **{name: _finite(asdict(getattr(self.means, name))) for name in MEASURES},
            "by_position": [
                {"start": span.start, "stop": span.stop, **_row(span.totals)} for span in self.curve
            ],
            "by_document": [
                {"name": name, **_row(totals)}
                for name, totals in zip(self.names, self.documents, strict=True)
            ],
        }


def make_report(
    scores: Sequence[DocumentScores],
    positions: PositionSums,
    about: dict[str, Any],
    span: int,
    seed: int,
) -> PerplexityReport:
    """The report of some scores.

    Args:
      scores, positions: as `score_documents` returns them.
      span: positions of a point of the curve; 0 is a power of two that makes at most 16 points.
      seed: of the bootstrap.
    """
    longest = int(np.flatnonzero(positions.tokens)[-1]) + 1
    span = span or 1 << math.ceil(math.log2(max(1, longest / _POINTS)))
    documents = tuple(map(document_totals, scores))
    return PerplexityReport(
        about=about,
        names=tuple(each.name for each in scores),
        documents=documents,
        total=overall(documents),
        means=estimates(documents, seed),
        curve=tuple(by_position(positions, span)),
    )


def summary_table(report: PerplexityReport) -> Table:
    """The means with their errors."""
    total = report.total
    table = Table(
        title=f"{len(report.documents):,} documents, {total.tokens:,} tokens, "
        f"{total.text_bytes:,} bytes",
        caption="standard errors: bootstrap over documents",
    )
    table.add_column("mean")
    table.add_column("value", justify="right")
    table.add_column("standard error", justify="right")
    for name, label in MEASURES.items():
        estimate: Estimate = getattr(report.means, name)
        table.add_row(label, _shown(estimate.value), _shown(estimate.standard_error))
    return table


def curve_table(report: PerplexityReport) -> Table:
    """The curve over the position."""
    table = Table(title="by tokens of context", caption="all tokens of all windows")
    for column in ("context", "tokens", "nats per token", "bits per byte"):
        table.add_column(column, justify="right")
    for span in report.curve:
        totals = span.totals
        table.add_row(
            f"{span.start:,} to {span.stop - 1:,}",
            f"{totals.tokens:,}",
            _shown(totals.nats_per_token),
            _shown(totals.bits_per_byte),
        )
    return table


def draw(report: PerplexityReport, path: Path) -> None:
    """Writes an image: the curve over the position, and how documents differ.

    In bits per byte, or of conversations in nats per token.

    Raises:
      HymbaError: as `make_figure`.
    """
    figure = make_figure(path, 10, 4)
    measure = "bits_per_byte" if report.total.text_bytes else "nats_per_token"
    position, documents = figure.subplots(1, 2)
    middles = [(span.start + span.stop - 1) / 2 for span in report.curve]
    values = [getattr(span.totals, measure) for span in report.curve]
    # A span without bytes, such as the rest of a character, has none.
    points = [point for point in zip(middles, values, strict=True) if point[1] is not None]
    if points:
        position.plot(*zip(*points, strict=True), "o-", markersize=4)
    position.set_xlabel("context, tokens")
    position.set_ylabel(MEASURES[measure])
    position.set_xlim(0)
    values = [getattr(each, measure) for each in report.documents]
    documents.hist([value for value in values if value is not None], bins=30)
    mean = getattr(report.means, measure).value
    if mean is not None:
        documents.axvline(mean, color="black", linestyle="--", label=f"mean {mean:.3f}")
        documents.legend()
    documents.set_xlabel(f"{MEASURES[measure]} of a document")
    documents.set_ylabel("documents")
    documents.yaxis.get_major_locator().set_params(integer=True)
    save_figure(figure, path)


def _row(totals: Totals) -> dict[str, Any]:
    values = {"tokens": totals.tokens, "text_bytes": totals.text_bytes}
    return _finite(values | {name: getattr(totals, name) for name in MEASURES})


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    """The values with None for what JSON has no number for."""
    return {name: None if value == math.inf else value for name, value in values.items()}


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:,.4f}" if abs(value) < 1e4 else f"{value:,.4g}"
