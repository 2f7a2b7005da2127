"""How prefill and decoding of the paper's designs grow with the length, measured or compiled.

    python benchmarks/length.py --picture benchmarks/length.png   # all of it
    python benchmarks/length.py --designs 06_llama 13_hymba --lengths 1024 8192 --target cpu

One sequence, random weights. On the CPU, in float32: seconds to prefill so many tokens, and
milliseconds to decode one more behind them. For an H100, in bfloat16, compiled ahead of time (extra
`cuda13`): FLOPs and HBM bytes of the same. Each design has a process of its own on each target, and
finished ones are lines of `--output`, which the same command does not measure again. Tables and
plot are of the designs, lengths and targets that were asked for.

`mamba2` has the width and depth of 01_mamba, with Mamba2 layers.
"""

import dataclasses
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Literal

# Before JAX starts: an H100's compiler is wanted, not an H100.
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import matplotlib
import numpy as np
import tyro
from _report import Row, median_ms, report
from inference import decode_ms, random_model

from hymba_jax.aot.cost import compile_and_analyze
from hymba_jax.aot.programs import inference_program
from hymba_jax.aot.topology import parse_topology
from hymba_jax.checkpoint.model_file import read_model
from hymba_jax.config import ComputeConfig, HymbaConfig
from hymba_jax.config.run import RunConfig
from hymba_jax.host import prepare_host
from hymba_jax.inference.engine import Engine

matplotlib.use("Agg")
import matplotlib.pyplot as plt

Target = Literal["cpu", "h100"]
DESIGNS = Path(__file__).parents[1] / "configs" / "designs"
COLUMNS = {
    "cpu": ("prefill s", "decode ms"),
    "h100": ("prefill TFLOP", "prefill GB", "decode GFLOP", "decode GB"),
}
REPEATS = 3  # timed calls, of long prompts one


@dataclass(frozen=True)
class Options:
    """What to measure.

    Attributes:
      designs: names of files in configs/designs, or `mamba2`.
      row: measure one design for one target in this process; what each child does.
      output: a line of JSON for each finished design, target and length.
      picture: where the plot goes; beside `output` if absent.
    """

    designs: tuple[str, ...] = (
        *("01_mamba", "mamba2", "06_llama", "sequential", "08_windows_and_global", "13_hymba"),
    )
    lengths: tuple[int, ...] = (1024, 2048, 4096, 8192)
    target: tuple[Target, ...] = ("cpu", "h100")
    output: Path = Path("runs/length.jsonl")
    picture: Path | None = None
    row: bool = False


def main(options: Options) -> None:
    if options.row:
        measure = measure_on_cpu if options.target[0] == "cpu" else compile_for_h100
        for length in options.lengths:
            row = {"target": options.target[0], "design": options.designs[0], "length": length}
            row |= measure(config_of(options.designs[0], max(options.lengths)), length)
            with options.output.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(json.dumps(row), flush=True)
        return
    options.output.parent.mkdir(parents=True, exist_ok=True)
    for target, design in product(options.target, options.designs):
        known = [row["length"] for row in finished(options, target) if row["design"] == design]
        if missing := [length for length in options.lengths if length not in known]:
            arguments = ["--designs", design, "--target", target, "--output", str(options.output)]
            arguments += ["--lengths", *map(str, missing), "--row"]
            subprocess.run([sys.executable, __file__, *arguments], check=True)
    rows = {target: finished(options, target) for target in options.target}
    for target, of_target in rows.items():
        report(f"one sequence, by design and length, {target}", of_target)
    draw(rows, options.picture or options.output.with_name("length.png"))


def finished(options: Options, target: Target) -> list[Row]:
    """The rows of a target that were asked for and are there."""
    lines = options.output.read_text().splitlines() if options.output.exists() else []
    return [
        row
        for row in map(json.loads, lines)
        if row["target"] == target
        and row["design"] in options.designs
        and row["length"] in options.lengths
    ]


def config_of(design: str, longest: int) -> HymbaConfig:
    name = "01_mamba" if design == "mamba2" else design
    config, _ = read_model(DESIGNS / f"{name}.toml")
    if design == "mamba2":
        config = dataclasses.replace(config, layers=config.layers.replace("M", "S"))
    return dataclasses.replace(config, max_positions=max(longest, config.max_positions))


def measure_on_cpu(config: HymbaConfig, length: int) -> Row:
    prepare_host()
    engine = Engine(random_model(config, "float32"))
    prompt = np.random.default_rng(0).integers(3, 250, length).tolist()
    # Two chunks compile all that longer prompts need, with the same cache; the memory of the
    # programs is new to the process once more.
    for _ in range(2):
        jax.block_until_ready(engine.prefill([prompt[: 2 * engine.max_chunk]], length))
    repeats = REPEATS if length <= 2 * engine.max_chunk else 1
    prefill = median_ms(lambda: engine.prefill([prompt], length), warmup=0, repeats=repeats)
    return {"prefill s": prefill / 1e3, "decode ms": decode_ms(engine, 1, length, REPEATS)}


def compile_for_h100(config: HymbaConfig, length: int) -> Row:
    topology = parse_topology("h100:1")
    run = RunConfig(model=config, compute=ComputeConfig(dtype="bfloat16", param_dtype="bfloat16"))
    row: Row = {}
    for name, unit in (("prefill", 1e12), ("decode", 1e9)):
        program = inference_program(run, name, topology.devices(), 1, length)
        _, cost = compile_and_analyze(program, topology.chip)
        if cost is None:
            raise SystemExit(f"{name} of {length} tokens does not fit an H100")
        flops, size = COLUMNS["h100"][:2] if name == "prefill" else COLUMNS["h100"][2:]
        row |= {flops: cost.work.flops / unit, size: cost.work.hbm_bytes / 1e9}
    return row


def draw(rows: dict[Target, list[Row]], picture: Path) -> None:
    """A row of panels for each target, a panel for each number."""
    width = max(len(COLUMNS[target]) for target in rows)
    figure, axes = plt.subplots(
        len(rows), width, figsize=(4 * width, 3.6 * len(rows)), layout="constrained", squeeze=False
    )
    for panels, (target, of_target) in zip(axes, rows.items(), strict=True):
        for panel in panels[len(COLUMNS[target]) :]:
            panel.set_axis_off()
        for panel, column in zip(panels, COLUMNS[target], strict=False):
            for design in dict.fromkeys(row["design"] for row in of_target):
                points = sorted(
                    (int(row["length"]), float(row[column]))
                    for row in of_target
                    if row["design"] == design
                )
                panel.plot(*zip(*points, strict=True), "o-", label=design)
            panel.set(title=f"{column}, {target}", xlabel="tokens")
            panel.set_xscale("log", base=2)
            panel.set_xticks([*{row["length"] for row in of_target}])
            panel.xaxis.set_major_formatter("{x:g}")
            panel.set_ylim(bottom=0)
            panel.grid(alpha=0.3)
    axes[0, 0].legend(fontsize="small", frameon=False)
    figure.savefig(picture, dpi=120)


if __name__ == "__main__":
    main(tyro.cli(Options))
