"""The curves of a training run, from its `metrics.jsonl`."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hymba_jax.analysis.figures import COLORS
from hymba_jax.errors import HymbaError
from hymba_jax.files import Location, parse_json, read_text
from hymba_jax.report.page import Picture, Section, Table
from hymba_jax.report.svg import new_figure
from hymba_jax.training.metrics import JSON_LINES

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Of what is drawn beside the loss, in this order.
_SMALL = {
    "learning_rate": "learning rate",
    "grad_norm": "gradient norm",
    "tokens_per_second": "tokens per second",
}
_LAST = {
    "step": "steps",
    "tokens_seen": "tokens seen",
    "loss": "training loss",
    "validation_loss": "validation loss",
    "validation_bits_per_byte": "validation, bits per byte",
}


def read_metrics(directory: Location) -> list[dict[str, Any]]:
    """The lines of a run's metrics, first step first; none of what is no run.

    Raises:
      HymbaError: a line is damaged.
    """
    path = directory / JSON_LINES
    if not path.is_file():
        return []
    lines = [line for line in read_text(path).split("\n") if line.strip()]
    try:
        return [dict(parse_json(line)) for line in lines]
    except (ValueError, TypeError) as error:
        raise HymbaError(
            f"{path}: a line is damaged ({error}): resume the run, which sets it aside"
        ) from error


def training_section(metrics: Sequence[dict[str, Any]]) -> Section:
    """Loss, learning rate, gradient norm and speed over the tokens of training."""
    figure = new_figure(9, 5.6)
    grid = figure.add_gridspec(2, 3, height_ratios=(2, 1))
    loss = figure.add_subplot(grid[0, :])
    _curve(loss, metrics, "loss", COLORS["cross"], "training")
    _curve(loss, metrics, "validation_loss", COLORS["ssm"], "validation", "o-")
    loss.set_ylabel("loss")
    loss.legend(frameon=False)
    for i, (name, label) in enumerate(_SMALL.items()):
        axis = figure.add_subplot(grid[1, i])
        _curve(axis, metrics, name, COLORS["cross"])
        axis.set_title(label, fontsize="medium")
    last: dict[str, Any] = {}
    for line in metrics:
        last |= {name: line[name] for name in _LAST if line.get(name) is not None}
    rows = [(label, _shown(last[name])) for name, label in _LAST.items() if name in last]
    caption = (
        "Each point covers the steps since the one before it. Validation is on text that is not "
        "in training. Of the objective next_token the loss is the cross entropy in nats per token; "
        "those of other objectives do not compare, and curves end with each stage."
    )
    return Section(
        "Training",
        pictures=[Picture("Loss over the tokens of training", caption, figure)],
        tables=[Table("At the end", ("", "last value"), rows)],
    )


def _curve(
    axis: "Axes",
    metrics: Sequence[dict[str, Any]],
    name: str,
    color: str,
    label: str = "",
    style: str = "-",
) -> None:
    """A metric over tokens, in millions, where it is known; a line for each stage."""
    tokens = [line.get("tokens_seen", math.nan) for line in metrics]
    unit = 1e6 if max(tokens, default=0) >= 1e6 else 1
    points: dict[str, list[tuple[float, float]]] = {}
    for count, line in zip(tokens, metrics, strict=True):
        if line.get(name) is not None:
            points.setdefault(line.get("stage", ""), []).append((count / unit, line[name]))
    for of_stage in points.values():
        axis.plot(*zip(*of_stage, strict=True), style, color=color, label=label, markersize=4)
        label = ""
    axis.set_xlabel("million tokens" if unit > 1 else "tokens")


def _shown(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4f}"
