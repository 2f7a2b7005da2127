"""How fast a training step is, on whatever device JAX finds.

python benchmarks/train_step.py --config configs/tiny.toml
"""

import time
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
import tyro
from _report import Row, median_ms, report

from hymba_jax.host_memory import keep_freed_memory
from hymba_jax.run_config import RunConfig
from hymba_jax.sharding import batch_sharding, make_mesh
from hymba_jax.training.optimizer import make_optimizer
from hymba_jax.training.state import init_state, make_template
from hymba_jax.training.step import compile_train_step


@dataclass(frozen=True)
class Args:
    """Times training steps on random tokens.

    Attributes:
      config: the run's TOML file.
      steps: how many are timed, after two that are not.
      keep_memory: keep freed memory in the process, as `train.py` does.
      json: file for the rows as JSON lines.
    """

    config: Path = Path("configs/tiny.toml")
    steps: int = 10
    keep_memory: bool = True
    json: Path | None = None


def main(args: Args) -> None:
    if args.keep_memory:
        keep_freed_memory()
    run = RunConfig.from_toml(args.config)
    training, length = run.training, run.data.sequence_length
    mesh, optimizer = make_mesh(), make_optimizer(run.training)
    template = make_template(run.model, run.compute, optimizer, mesh)
    state = init_state(run.model, run.compute, optimizer, template, run.seed)
    place = batch_sharding(mesh)
    start = time.perf_counter()
    step = compile_train_step(template, optimizer, training, length, place)
    compile_seconds = time.perf_counter() - start
    shape = (training.batch_size, length)
    tokens = np.random.default_rng(0).integers(3, run.model.vocab_size, shape, np.int32)
    batch = jax.device_put({"inputs": tokens, "targets": tokens}, place)

    def one_step() -> object:
        nonlocal state
        state, metrics = step(state, batch)
        return metrics

    milliseconds = median_ms(one_step, repeats=args.steps)
    tokens_per_second = 1e3 * tokens.size / milliseconds
    row: Row = {
        "config": args.config.stem,
        "parameters": template.num_params,
        "batch": f"{shape[0]} x {length}",
        "dtype": run.compute.dtype,
        "kept memory": str(args.keep_memory),
        "compile s": compile_seconds,
        "step ms": milliseconds,
        "tokens/s": tokens_per_second,
        # 6 operations a parameter and token; attention's and the scan's own are left out.
        "GFLOP/s": 6e-9 * template.num_params * tokens_per_second,
    }
    report("training step", [row], args.json)


if __name__ == "__main__":
    main(tyro.cli(Args))
