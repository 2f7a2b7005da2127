"""Recall of the paper's designs, small and of equal size, on generated tasks; and their bits per
byte on text.

    python benchmarks/recall.py --picture benchmarks/recall.png   # all of it, in 25 to 66 minutes
    python benchmarks/recall.py --tasks mqar --seeds 0            # a part of it, in ten minutes

A cell is a task, a design and a seed (`_recall_training.py`). Finished cells are lines of
`OUTPUT/cells.jsonl` and are not trained again, so the same command resumes where it was stopped.
Tables and plot are of the cells that were asked for.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import tyro
from _recall_training import BUDGETS, DESIGNS, Cell, TaskName, train_all

from hymba_jax.figures import make_figure, save_figure

CELLS = "cells.jsonl"

type Scores = Mapping[str, list[float]]
"""Of each size of a task, one number a seed."""

type Results = Mapping[tuple[TaskName, str], Scores]
"""By task and design."""


class Panel(NamedTuple):
    """Part of the plot.

    Attributes:
      label: of its horizontal axis.
      ticks: the sizes there, by what is written below them.
    """

    task: TaskName
    label: str
    ticks: dict[int, str]


PANELS = (
    Panel(
        "mqar",
        "pairs, in 4 times as many tokens",
        {n: f"{n} in {4 * n}" for n in (2, 4, 8, 16, 32)},
    ),
    Panel("mqar", "tokens, with 8 pairs", {n: f"8 in {n}" for n in (32, 64, 128)}),
    Panel(
        "selective_copying",
        "symbols, in 4 times as many tokens",
        {n: f"{n} in {4 * n}" for n in (2, 4, 8, 16)},
    ),
    Panel("induction", "tokens", {n: f"1 in {n}" for n in (8, 16, 32, 64, 128)}),
)
MARKERS = "osD^v*P"


@dataclass(frozen=True)
class Args:
    """Trains, evaluates, prints tables and draws.

    Attributes:
      tasks, designs, seeds: the cells.
      steps: of training on each task; those of `BUDGETS` if absent.
      learning_rate: the highest.
      kiloparameters: of the layers of each design, in thousands.
      processes: that train a cell each, with a core each.
      output: directory for the finished cells and the tokens of the text.
      picture: where the plot of the generated tasks goes; into `output` if absent.
    """

    tasks: tuple[TaskName, ...] = ("mqar", "selective_copying", "induction", "language")
    designs: tuple[str, ...] = tuple(DESIGNS)
    seeds: tuple[int, ...] = (0, 1, 2)
    steps: int | None = None
    learning_rate: float = 4e-3
    kiloparameters: int = 1000
    processes: int = 2
    output: Path = Path("runs/recall")
    picture: Path | None = None


def main(args: Args) -> None:
    args.output.mkdir(parents=True, exist_ok=True)
    file = args.output / CELLS
    finished = finished_cells(file)
    missing = [cell for cell in cells(args) if cell not in finished]
    for number, (cell, result) in enumerate(train_all(missing, args.output, args.processes), 1):
        line = json.dumps({"cell": asdict(cell), **result})
        with file.open("a") as lines:
            lines.write(line + "\n")
        print(f"{number} of {len(missing)}: {line}", flush=True)
    results = collect(args, finished_cells(file))
    for task in args.tasks:
        print("\n".join(table(task, results, args.designs)), end="\n\n")
    draw(results, args)


def cells(args: Args) -> Iterator[Cell]:
    """Those that were asked for, so that all designs have a seed before the next one."""
    for seed, task, design in product(args.seeds, args.tasks, args.designs):
        budget = BUDGETS[task]
        steps = budget.steps if args.steps is None else args.steps
        yield Cell(
            task, design, seed, steps, budget.tokens, args.learning_rate, args.kiloparameters
        )


def finished_cells(file: Path) -> dict[Cell, dict[str, Any]]:
    """The finished cells, and their lines."""
    lines = file.read_text().splitlines() if file.exists() else []
    return {Cell(**line["cell"]): line for line in map(json.loads, lines)}


def collect(args: Args, finished: Mapping[Cell, dict[str, Any]]) -> Results:
    """The scores of the cells that were asked for, the seeds' together."""
    results: dict[tuple[TaskName, str], dict[str, list[float]]] = {}
    for cell in cells(args):
        several = results.setdefault((cell.task, cell.design), {})
        for size, score in finished[cell]["scores"].items():
            several.setdefault(size, []).append(score)
    return results


def table(task: TaskName, results: Results, designs: Sequence[str]) -> Iterator[str]:
    """Lines of Markdown: the median seed at each size, and the lowest and highest."""
    sizes = [*results[task, designs[0]]]
    yield f"| {task} | {' | '.join(sizes)} |"
    yield "|---|" + "---:|" * len(sizes)
    for design in designs:
        scores = (
            f"{median(s):.2f} ({min(s):.2f} to {max(s):.2f})"
            for s in results[task, design].values()
        )
        yield f"| {design} | {' | '.join(scores)} |"


def draw(results: Results, args: Args) -> None:
    """A panel for each of `PANELS` whose task was asked for; bars are from the lowest seed to the
    highest."""
    panels = [panel for panel in PANELS if panel.task in args.tasks]
    if not panels:
        return
    picture = args.picture or args.output / "recall.png"
    figure = make_figure(picture, 3.2 * len(panels) + 1.3, 3.2)
    all_axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for panel, axes in zip(panels, all_axes, strict=True):
        for i, design in enumerate(args.designs):
            scores = [results[panel.task, design][size] for size in panel.ticks.values()]
            middles = [median(several) for several in scores]
            beside = 0.06 * (i - (len(args.designs) - 1) / 2)  # so that equal designs are all seen
            axes.errorbar(
                [place + beside for place in range(len(scores))],
                middles,
                [
                    [middle - min(s) for middle, s in zip(middles, scores, strict=True)],
                    [max(s) - middle for middle, s in zip(middles, scores, strict=True)],
                ],
                marker=MARKERS[i % len(MARKERS)],
                label=design,
            )
        axes.set_xticks(range(len(panel.ticks)), [*panel.ticks])
        axes.set_xlabel(panel.label)
        axes.set_title(panel.task)
    all_axes[0].set_ylabel("accuracy")
    figure.legend(*all_axes[0].get_legend_handles_labels(), loc="outside right center")
    save_figure(figure, picture)


if __name__ == "__main__":
    main(tyro.cli(Args))
