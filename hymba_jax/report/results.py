"""Files of `hymba evaluate --output` as tables and curves."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hymba_jax.analysis.figures import COLORS
from hymba_jax.errors import HymbaError
from hymba_jax.evaluation.needle import WITHOUT_NEEDLE, NeedleReport, draw_needles
from hymba_jax.evaluation.report import MEASURES
from hymba_jax.files import read_json
from hymba_jax.report.page import Picture, Section, Table
from hymba_jax.report.svg import new_figure

_STDERR = "_stderr"  # the harness' suffix of a metric's name


def results_section(files: Mapping[str, Path]) -> Section:
    """Tables of all files, by their names, and curves or heat maps.

    Raises:
      HymbaError: a file cannot be read, or `hymba evaluate --output` did not write it.
    """
    tables, pictures = [], []
    for name, path in files.items():
        results = read_json(path)
        try:
            if "results" in results:
                tables.append(_tasks(name, results))
            elif WITHOUT_NEEDLE in results:
                tables.append(_needles(name, results))
                pictures.append(_heat_maps(name, results))
            else:
                tables.append(_documents(name, results))
                pictures += _curve(name, results)
        except (AttributeError, KeyError, TypeError, ValueError) as error:  # of another shape
            raise HymbaError(f"{path}: not a file that `hymba evaluate --output` writes") from error
    return Section("Evaluations", pictures=pictures, tables=tables)


def _tasks(name: str, results: Mapping[str, Any]) -> Table:
    rows = []
    for task, metrics in results["results"].items():
        for key, value in metrics.items():
            metric, _, filter_name = key.partition(",")
            if metric.endswith(_STDERR) or not isinstance(value, int | float) or not filter_name:
                continue
            error = metrics.get(f"{metric}{_STDERR},{filter_name}")
            shown = f"{error:.4f}" if isinstance(error, int | float) else ""
            kind = metric if filter_name == "none" else f"{metric}, {filter_name}"
            rows.append((task, kind, f"{value:.4f}", shown))
    header = "task", "metric", "value", "standard error"
    return Table(f"Tasks: {name}", header, rows, f"Of {_model(results.get('config', {}))}.")


def _model(about: Mapping[str, Any]) -> str:
    """What was evaluated, which need not be the model of the page."""
    parts = [str(about.get("model") or "an unnamed model")]
    parts += [f"{name} {about[name]}" for name in ("step", "adapter") if about.get(name)]
    return ", ".join(parts)


def _documents(name: str, results: Mapping[str, Any]) -> Table:
    rows = [
        (label, _shown(results[key].get("value")), _shown(results[key].get("standard_error")))
        for key, label in MEASURES.items()
    ]
    caption = (
        f"Of {_model(results)}, on {results['data']}: documents {results['documents']:,}, tokens "
        f"{results['tokens']:,}, window {results['window']:,}; standard errors by bootstrap over "
        "documents"
    )
    return Table(f"Documents: {name}", ("mean", "value", "standard error"), rows, caption)


def _needles(name: str, results: Mapping[str, Any]) -> Table:
    report = NeedleReport.from_json(results)
    rows = [
        (f"{length:,}", f"{depth:.0%}", f"{report.accuracy[i, j]:.0%}", _shown(report.nats[i, j]))
        for i, length in enumerate(report.lengths)
        for j, depth in enumerate(report.depths)
    ]
    header = "tokens of the prompt", "depth", "accuracy", "nats per token of the number"
    without = ", ".join(_shown(nats) for nats in report.without)
    caption = (
        f"Of {_model(results)}, on {results['data']}: trials of each {results['trials']:,}; "
        f"without a needle, nats per token {without}"
    )
    return Table(f"Needles: {name}", header, rows, caption)


def _heat_maps(name: str, results: Mapping[str, Any]) -> Picture:
    figure = new_figure(9, 3.4)
    draw_needles(figure, NeedleReport.from_json(results))
    caption = "How often a number in a long prompt is found, by its depth and the prompt's length."
    return Picture(f"Needle in a haystack: {name}", caption, figure)


def _curve(name: str, results: Mapping[str, Any]) -> list[Picture]:
    """Bits per byte, or nats per token where bytes are not known, over the context."""
    measure = "bits_per_byte" if results["text_bytes"] else "nats_per_token"
    points = [
        ((span["start"] + span["stop"] - 1) / 2, float(span[measure]))
        for span in results["by_position"]
        if span[measure] is not None
    ]
    if len(points) < 2:
        return []
    figure = new_figure(9, 3)
    axis = figure.subplots()
    axis.plot(*zip(*points, strict=True), "o-", color=COLORS["cross"], markersize=4)
    axis.set_xlabel("tokens of context")
    axis.set_ylabel(MEASURES[measure])
    axis.set_xlim(0)
    caption = "Of all tokens of all windows: what the model gains from more context."
    return [Picture(f"Over the position in the context: {name}", caption, figure)]


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:,.4f}"
