"""What a training step on packed documents costs beside one on as many concatenated tokens.

python benchmarks/packing.py [--config configs/tiny.toml] [--turns 40]

Both steps are compiled in one process and done in turns, so that whatever else the machine does
slows both. The ratio is the median over turns, with the interval that holds 95 % of such medians
when turns are drawn again (bootstrap). For accelerators `hymba compile --data.packing documents`
counts FLOPs and bytes.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import numpy as np
import tyro
from _report import Row, report
from train_step import make_step

from hymba_jax.checkpoint.model_file import with_vocabulary
from hymba_jax.config.run import RunConfig
from hymba_jax.host import prepare_host


@dataclass(frozen=True)
class Args:
    """Times both steps in turns.

    Attributes:
      config: the run's TOML file.
      turns: how often each is timed, after two that are not.
      json: file for the rows as JSON lines.
    """

    config: Path = Path("configs/tiny.toml")
    turns: int = 40
    json: Path | None = None


def main(args: Args) -> None:
    prepare_host()
    run = with_vocabulary(RunConfig.from_toml(args.config))
    concatenated, packed = (
        make_step(replace(run, data=replace(run.data, packing=packing)))[0]
        for packing in ("concat", "documents")
    )
    times = np.array([[seconds(concatenated), seconds(packed)] for _ in range(args.turns + 2)][2:])
    report(f"a training step of {args.config.stem}, in turns", [*rows(times)], args.json)


def rows(times: np.ndarray) -> list[Row]:
    """A row each for wall-clock and processor time, of shape (turns, 2, 2): step, then clock."""
    found: list[Row] = []
    draws = np.random.default_rng(0).integers(0, len(times), (2000, len(times)))
    for index, clock in enumerate(("wall-clock", "processor")):
        concatenated, packed = 1e3 * times[..., index].T
        ratios = packed / concatenated
        low, high = np.quantile(np.median(ratios[draws], axis=1), (0.025, 0.975))
        found.append(
            {
                "time": clock,
                "concatenated ms": float(np.median(concatenated)),
                "packed ms": float(np.median(packed)),
                "ratio": float(np.median(ratios)),
                "from": float(low),
                "to": float(high),
            }
        )
    return found


def seconds(step: Callable[[], object]) -> tuple[float, float]:
    """What a step takes, by the wall clock and of the processors."""
    wall, processor = time.perf_counter(), time.process_time()
    jax.block_until_ready(step())
    return time.perf_counter() - wall, time.process_time() - processor


if __name__ == "__main__":
    main(tyro.cli(Args))
