"""`hymba schedule`: what a run does over its tokens, as a table, as text plots and as an image."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console

from hymba_jax.config.run import RunConfig
from hymba_jax.figures import make_figure, save_figure
from hymba_jax.files import resolve_path
from hymba_jax.training.arguments import parse_choice
from hymba_jax.training.schedule import run_schedule
from hymba_jax.types import Float, Int

_COLUMNS = 64
_LEVELS = " ▁▂▃▄▅▆▇█"
_POINTS = 2000  # of a curve: more than an image has pixels


@dataclass(frozen=True)
class ScheduleConfig:
    """What to draw.

    Attributes:
      image: file to write a plot to, as PNG, PDF or SVG by its suffix; none if empty.
    """

    image: str = ""


@dataclass(frozen=True)
class Curves:
    """What a run does, at some of its steps.

    Attributes:
      tokens: before each of the steps.
      learning_rate, sequence_length: of each.
      shares: of the sequences, by source.
    """

    tokens: Int[np.ndarray, " points"]
    learning_rate: Float[np.ndarray, " points"]
    sequence_length: Int[np.ndarray, " points"]
    shares: Mapping[str, Float[np.ndarray, " points"]]


def main(args: Sequence[str], prog: str) -> None:
    """Prints the schedule of a run, and draws it if wanted.

    Raises:
      HymbaError: there is no such run, or the image cannot be written.
    """
    does = "Shows the learning rate, the data and the sequence length of a run over its tokens."
    choice, run = parse_choice(ScheduleConfig, args, prog, does)
    curves = schedule_curves(run, _COLUMNS)
    console = Console(soft_wrap=True, highlight=False, markup=False, emoji=False)
    for stage in run.resolved_stages:
        console.print(stage.describe())
    for name, values in _plotted(curves).items():
        console.print(f"{name}, {_number(values.min())} to {_number(values.max())}")
        console.print(f"  {bars(values)}")
    console.print(f"  0{f'{_total(run):,} tokens':>{_COLUMNS - 1}}")
    if choice.image:
        draw(run, resolve_path(choice.image))
        console.print(choice.image)


def schedule_curves(run: RunConfig, points: int) -> Curves:
    """The schedule of a run at this many numbers of tokens, evenly spread."""
    stages = run.resolved_stages
    tokens = np.linspace(0, _total(run), points, endpoint=False).astype(np.int64)
    starts = np.array([stage.tokens_before for stage in stages])
    at = np.searchsorted(starts, tokens, side="right") - 1
    per_step = np.array([stage.tokens_per_step for stage in stages])
    steps = np.array([stage.start for stage in stages])[at] + (tokens - starts[at]) // per_step[at]
    rates = run_schedule(run)(steps)
    shares = [stage.shares for stage in stages]
    names = dict.fromkeys(name for share in shares for name in share)
    return Curves(
        tokens,
        np.asarray(rates, np.float64),
        np.array([stage.run.data.sequence_length for stage in stages])[at],
        {name: np.array([share.get(name, 0.0) for share in shares])[at] for name in names},
    )


def bars(values: Float[np.ndarray, " points"]) -> str:
    """A character per value, as high as its part of the largest."""
    largest = values.max() or 1.0
    return "".join(_LEVELS[round(float(value / largest) * (len(_LEVELS) - 1))] for value in values)


def draw(run: RunConfig, path: Path) -> None:
    """Writes a plot of a run's schedule, into a directory that is made if it is not there.

    Raises:
      HymbaError: matplotlib is not installed, or does not know the file's suffix.
    """
    curves, stages = schedule_curves(run, _POINTS), run.resolved_stages
    figure = make_figure(path, 8, 6)
    rate, share, length = figure.subplots(3, sharex=True)
    rate.plot(curves.tokens, curves.learning_rate, color="tab:blue")
    rate.set_ylabel("learning rate")
    share.stackplot(curves.tokens, list(curves.shares.values()), labels=list(curves.shares))
    share.set_ylabel("share of sequences")
    share.set_ylim(0, 1)
    share.legend(loc="upper left")
    length.step(curves.tokens, curves.sequence_length, where="post", color="tab:green")
    length.set_ylabel("sequence length")
    length.set_ylim(0)
    length.set_xlabel("tokens")
    length.set_xlim(0, _total(run))
    for axes in (rate, share, length):
        for stage in stages[1:]:
            axes.axvline(stage.tokens_before, color="gray", linestyle=":")
    for stage in stages:
        if stage.name:
            rate.annotate(
                stage.name,
                (stage.tokens_before, 1.02),
                xycoords=("data", "axes fraction"),
                fontsize="small",
            )
    path.parent.mkdir(parents=True, exist_ok=True)
    save_figure(figure, path)


def _plotted(curves: Curves) -> dict[str, Float[np.ndarray, " points"]]:
    """The curves by what they show, without those that say nothing."""
    shares = {f"share of {name}": share for name, share in curves.shares.items()}
    plotted = {"learning rate": curves.learning_rate}
    plotted |= {name: share for name, share in shares.items() if len(shares) > 1}
    return plotted | {"sequence length": curves.sequence_length.astype(np.float64)}


def _number(value: float) -> str:
    """A learning rate or a share in three digits, and a length in all of its own."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _total(run: RunConfig) -> int:
    """Tokens of all stages."""
    last = run.resolved_stages[-1]
    return last.tokens_before + last.tokens
