"""What tracing, lowering and compiling a training step of the 1.5B costs, with scanned and unrolled
layers.

    python benchmarks/compile_time.py

A model of 32 layers should cost about as much as one with the same pattern and 11, since repeated
layers are compiled once. Nothing is computed and no parameter is ever held.
"""

import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path

import jax
import tyro
from _report import Row, report

from hymba_jax.checkpoint.train_state import abstract_train_state
from hymba_jax.config import PRESETS, ComputeConfig, HymbaConfig, Remat
from hymba_jax.config.layer_pattern import hymba_pattern
from hymba_jax.config.training import TrainingConfig
from hymba_jax.data.batch import abstract_batch
from hymba_jax.parallel.mesh import make_mesh
from hymba_jax.training.loss import make_loss_fn, next_token_loss
from hymba_jax.training.optimizer import make_optimizer
from hymba_jax.training.step import make_train_step


@dataclass(frozen=True)
class Args:
    """Compiles training steps for the present device.

    Attributes:
      preset: the architecture; its depth is varied.
      batch_size: sequences per step.
      sequence_length: tokens a sequence.
      remat: what the backward pass recomputes.
      unrolled: also compile with every layer by itself, which takes minutes.
      json: file for the rows as JSON lines.
    """

    preset: str = "hymba-1.5b"
    batch_size: int = 1
    sequence_length: int = 2048
    remat: Remat = "block"
    unrolled: bool = True
    json: Path | None = None


def main(args: Args) -> None:
    config = PRESETS[args.preset]
    third = dataclasses.replace(config, layers=hymba_pattern(round(config.num_layers / 3)))
    compile_step(third, args, scan_layers=True)  # the first call includes start-up
    rows = [
        compile_step(third, args, scan_layers=True),
        compile_step(config, args, scan_layers=True),
    ]
    if args.unrolled:
        rows.append(compile_step(config, args, scan_layers=False))
    for row in rows:
        row["relative to a third"] = float(row["total s"]) / float(rows[0]["total s"])
    report(f"compiling a training step, {args.preset}", rows, args.json)


def compile_step(config: HymbaConfig, args: Args, *, scan_layers: bool) -> Row:
    """Seconds of each stage, and the size of the program."""
    jax.clear_caches()
    compute = ComputeConfig(dtype="bfloat16", remat=args.remat, scan_layers=scan_layers)
    start = time.perf_counter()
    optimizer = make_optimizer(TrainingConfig())
    abstract = abstract_train_state(config, compute, optimizer, make_mesh())
    loss_fn = make_loss_fn(next_token_loss, abstract.graph)
    step = make_train_step(loss_fn, optimizer, micro_batch_size=args.batch_size)
    batch = abstract_batch(args.batch_size, args.sequence_length)
    traced = jax.jit(step, donate_argnums=0).trace(abstract.state, batch)
    seconds = [time.perf_counter() - start]
    lowered = traced.lower()
    seconds.append(time.perf_counter() - start)
    lowered.compile()
    seconds.append(time.perf_counter() - start)
    return {
        "layers": config.layers if scan_layers else f"{config.num_layers}, unrolled",
        "depth": config.num_layers,
        "trace s": seconds[0],
        "lower s": seconds[1] - seconds[0],
        "compile s": seconds[2] - seconds[1],
        "total s": seconds[2],
        "lines of HLO": lowered.as_text().count("\n"),
    }


if __name__ == "__main__":
    main(tyro.cli(Args))
