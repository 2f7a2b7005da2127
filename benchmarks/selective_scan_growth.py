"""How the time and the memory of the selective scan grow with the length, as a picture.

python benchmarks/selective_scan_growth.py [--picture FILE]
"""

from dataclasses import dataclass
from pathlib import Path

import matplotlib
import tyro
from _report import Row, report
from selective_scan import costs, make_inputs

from hymba_jax.ops.selective_scan import selective_scan

matplotlib.use("Agg")
import matplotlib.pyplot as plt


@dataclass(frozen=True)
class Options:
    """One sequence through a layer of Hymba-1.5B, float32, at these lengths."""

    lengths: tuple[int, ...] = (512, 1024, 2048, 4096, 8192, 16384)
    channels: int = 3200
    state: int = 16
    repeats: int = 5
    picture: Path = Path("selective_scan_growth.png")


def main(options: Options) -> None:
    rows: list[Row] = []
    for length in options.lengths:
        dy, inputs = make_inputs(1, length, options.channels, options.state)
        rows.append({"length": length, **costs(selective_scan, dy, inputs, options.repeats)})
    report(f"selective scan, B=1 E={options.channels} N={options.state}, float32", rows)
    draw(rows, options.picture)


def draw(rows: list[Row], path: Path) -> None:
    """Time and temporaries against length, with dotted lines of slope one through the first."""
    lengths = [float(row["length"]) for row in rows]
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    for panel, unit, title in zip(axes, ("ms", "MB"), ("time, ms", "temporaries, MB"), strict=True):
        for name, label in (("+ backward", "forward and gradient"), ("forward", "forward")):
            values = [float(row[f"{name} {unit}"]) for row in rows]
            (line,) = panel.loglog(lengths, values, "o-", base=2, label=label)
            proportional = [values[0] * length / lengths[0] for length in lengths]
            panel.loglog(lengths, proportional, ":", base=2, color=line.get_color())
        panel.set(title=title, xlabel="length", xticks=lengths, xticklabels=map(int, lengths))
        panel.yaxis.set_major_formatter("{x:g}")
        panel.grid(alpha=0.3)
    axes[0].legend(frameon=False)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main(tyro.cli(Options))
