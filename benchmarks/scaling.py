"""Cost per chip of a training step, by number of chips, counted in the compiled program.

python benchmarks/scaling.py [--chips 1 2 4 ...] [--picture FILE] [--json FILE]

Compiles ahead of time for slices of TPU v5e (extra `tpu`; see `hymba compile`). The layers
are eight of the 1.5B's with a sliding window: one chip holds no more, and equal layers are compiled
once. A batch is a sequence of 2048 tokens a chip of the largest slice (strong scaling: the same
batch on fewer chips) or of this one (weak). `[parallel]` is that of configs/hymba_1_5b.toml:
parameters are sharded over 8 at most, batches over all chips.
"""

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

# Before JAX starts: the compiler is wanted, not a TPU.
os.environ["JAX_PLATFORMS"] = "cpu"

import matplotlib.pyplot as plt
import tyro
from _report import Row, report

from hymba_jax.aot.cost import compile_and_analyze
from hymba_jax.aot.programs import training_program
from hymba_jax.aot.topology import parse_topology
from hymba_jax.checkpoint.model_file import with_vocabulary
from hymba_jax.config.parallel import ParallelConfig
from hymba_jax.config.run import RunConfig

PARAMETER_SHARDS = 8


@dataclass(frozen=True)
class Args:
    """Counts the cost per chip of a training step, by number of chips.

    Attributes:
      chips: sizes of the slices, powers of two.
      layers: their pattern.
      picture: where the picture goes.
      json: file for the rows as JSON lines.
    """

    chips: tuple[int, ...] = (1, 4, 16, 64, 256)
    layers: str = "8*W"
    picture: Path = Path("scaling.png")
    json: Path | None = None


def main(args: Args) -> None:
    rows = [*count(args)]
    report("a training step on slices of TPU v5e, per chip, as compiled", rows, args.json)
    draw(rows, args.picture)


def count(args: Args) -> Iterator[Row]:
    base = with_vocabulary(RunConfig.from_toml("configs/hymba_1_5b.toml")).resolved_stages[0].run
    base = replace(base, model=replace(base.model, layers=args.layers))
    for chips in args.chips:
        topology = parse_topology(slice_of(chips))
        devices = topology.devices()
        parallel = ParallelConfig(data=-1, fsdp=min(chips, PARAMETER_SHARDS))
        for scaling, batch in {"strong": max(args.chips), "weak": chips}.items():
            if scaling == "weak" and chips == max(args.chips):
                continue  # both are the same there
            training = replace(
                base.training, batch_size=batch, gradient_accumulation_steps=batch // chips
            )
            program = training_program(replace(base, training=training, parallel=parallel), devices)
            _, cost = compile_and_analyze(program, topology.chip)
            if cost is None:
                raise SystemExit(f"{chips} chips, {scaling}: does not fit")
            work = cost.work
            yield {
                "scaling": scaling,
                "chips": chips,
                "TFLOP": work.flops / 1e12,
                "HBM GB": work.hbm_bytes / 1e9,
                "collective GB": work.collective_bytes / 1e9,
                "GB of parameters": 4 * program.num_params / 1e9,
                "sequences at a time": batch // chips,
            }
            print(f"{chips} chips, {scaling}: compiled", flush=True)


def slice_of(chips: int) -> str:
    """The squarest slice of so many chips, a power of two."""
    power = chips.bit_length() - 1
    return f"v5e:{2 ** (power // 2)}x{2 ** (power - power // 2)}"


def draw(rows: list[Row], picture: Path) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained", sharey=True)
    for axis, scaling in zip(axes, ("strong", "weak"), strict=True):
        # The largest slice's strong step is its weak one.
        largest = max(row["chips"] for row in rows)
        points = [row for row in rows if scaling == row["scaling"] or row["chips"] == largest]
        chips = [row["chips"] for row in points]
        for name, label in {
            "TFLOP": "TFLOP",
            "HBM GB": "HBM GB",
            "collective GB": "collective GB",
        }.items():
            values = [row[name] or math.nan for row in points]  # one chip sends nothing
            axis.plot(chips, values, "o-", label=label)
        axis.set_xscale("log", base=2)
        axis.set_xticks(chips, map(str, chips))
        axis.set_yscale("log")
        axis.set_xlabel("TPU v5e chips")
    axes[0].set_title("fixed batch (strong scaling)", fontsize="medium")
    axes[1].set_title("one sequence per chip (weak scaling)", fontsize="medium")
    axes[0].set_ylabel("per chip and training step")
    axes[0].legend(fontsize="small")
    figure.savefig(picture, dpi=120)


if __name__ == "__main__":
    main(tyro.cli(Args))
