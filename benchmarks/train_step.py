"""How fast a training step is, or a gradient of one of the family, on whatever device JAX finds.

python benchmarks/train_step.py [--config configs/tiny.toml]
python benchmarks/train_step.py --shape 125m [--batch 1] [--length 512] [--dtype float32]
python benchmarks/train_step.py --shape 125m --batch 4 --length 2048 --remat block  # 38 GB without

With a config: the run's whole training step, optimizer included, of four documents a row if it
packs them. With a shape: the summed loss and its gradient, jitted, of a model of the family; a row
for each batch with its length, each in a process of its own, so that its peak of memory is its own.
Steps are medians of calls after two that are not timed, temporaries the compiler's account.

GFLOP/s counts the FLOPs that the model needs (`hymba_jax/model/flops.py`), and none that are
done to save memory. `of matmul rate` is its share of the best rate, in the same process, of matmuls
of 1024 rows (on accelerators, which finish those too soon, 32768) with three of the model's kernels
in the same dtype.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from _report import Row, median_ms, peak_bytes, report, run_in_subprocess, short_ms, write_json
from flax import nnx

from hymba_jax.checkpoint.model_file import with_vocabulary
from hymba_jax.checkpoint.train_state import abstract_train_state, init_state
from hymba_jax.config import PRESETS, ComputeConfig, DType, HymbaConfig, Remat
from hymba_jax.config.run import RunConfig
from hymba_jax.data.batch import Batch
from hymba_jax.host import prepare_host
from hymba_jax.model import Hymba
from hymba_jax.model.abstract import Params
from hymba_jax.model.flops import training_flops
from hymba_jax.ops.matmul import matmul
from hymba_jax.parallel.mesh import batch_sharding, make_mesh
from hymba_jax.training.loss import make_loss_fn, next_token_loss
from hymba_jax.training.optimizer import make_optimizer
from hymba_jax.training.step import compile_train_step, run_step


@dataclass(frozen=True)
class Args:
    """Times steps on random tokens.

    Attributes:
      config: the run's TOML file.
      shape: in its place, one of the family.
      batch, length: of a shape; the first batch with the first length, and so on.
      dtype: of a shape's activations; its parameters are float32.
      remat: what a shape's backward pass recomputes.
      scan_layers: stack a shape's layers, so that they are compiled once.
      steps: how many are timed, after two that are not.
      prepare: the host's memory and vectors, as `train.py` does.
      row: measure the first batch in this process and write it to `json`, as each child does.
      json: file for the rows as JSON lines.
    """

    config: Path = Path("configs/tiny.toml")
    shape: Literal["125m", "350m", "1.5b"] | None = None
    batch: tuple[int, ...] = (1,)
    length: tuple[int, ...] = (512,)
    dtype: DType = "float32"
    remat: Remat = "none"
    scan_layers: bool = True
    steps: int = 10
    prepare: bool = True
    row: bool = False
    json: Path | None = None


def main(args: Args) -> None:
    if args.shape is not None and not args.row:
        report("loss and gradient", in_children(args), args.json)
        return
    if args.prepare:
        prepare_host()
    if args.shape is None:
        report("training step", [run_row(args)], args.json)
    elif args.json is not None:
        write_json([shape_row(args, PRESETS[f"hymba-{args.shape}"])], args.json)


def in_children(args: Args) -> list[Row]:
    """A row for each batch with its length, each measured in a process of its own."""
    shared = [
        *("--shape", str(args.shape), "--dtype", args.dtype, "--remat", args.remat),
        "--scan-layers" if args.scan_layers else "--no-scan-layers",
        *("--steps", str(args.steps)),
        "--prepare" if args.prepare else "--no-prepare",
    ]
    return [
        run_in_subprocess(__file__, [*shared, "--batch", str(batch), "--length", str(length)])
        for batch, length in zip(args.batch, args.length, strict=True)
    ]


def run_row(args: Args) -> Row:
    """Of the run's training step."""
    run = with_vocabulary(RunConfig.from_toml(args.config))
    start = time.perf_counter()
    one_step, params = make_step(run)
    compile_seconds = time.perf_counter() - start
    milliseconds = median_ms(one_step, repeats=args.steps)
    shape = (run.training.batch_size, run.data.sequence_length)
    return {
        "config": args.config.stem,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "batch": f"{shape[0]} x {shape[1]}",
        "dtype": run.compute.dtype,
        "host prepared": str(args.prepare),
        "compile s": compile_seconds,
        "step ms": milliseconds,
        **_rates(run.model, run.compute.dtype, params, shape, milliseconds),
    }


def make_step(run: RunConfig) -> tuple[Callable[[], object], Params]:
    """A call that does the run's next training step, on random tokens, and the model's shapes."""
    mesh = make_mesh(parallel=run.parallel)
    optimizer = make_optimizer(run.training)
    abstract = abstract_train_state(run.model, run.compute, optimizer, mesh)
    state = init_state(run.model, run.compute, optimizer, abstract, run.seed)
    train_step, batch_shape = run_step(run, next_token_loss, abstract.graph, optimizer, mesh)
    step = compile_train_step(train_step, abstract.state, batch_shape)
    shape = (run.training.batch_size, run.data.sequence_length)
    rng = np.random.default_rng(0)
    tokens = rng.integers(3, run.model.num_embeddings, shape, np.int32)
    batch = Batch(inputs=tokens, targets=tokens)
    if run.data.packing == "documents":  # four a row, in the mean
        starts = rng.random(shape) < 3 / shape[1]
        batch = batch._replace(segment_ids=1 + np.cumsum(starts, axis=1, dtype=np.int32))
    batch = jax.device_put(batch, batch_sharding(mesh))

    def one_step() -> object:
        nonlocal state
        state, metrics = step(state, batch)
        return metrics

    return one_step, abstract.state.params


def shape_row(args: Args, config: HymbaConfig) -> Row:
    """Of a shape's loss and gradient."""
    compute = ComputeConfig(dtype=args.dtype, remat=args.remat, scan_layers=args.scan_layers)
    init = nnx.jit(lambda: Hymba(config, compute, nnx.Rngs(0)))
    graph, variables = nnx.split(init())
    params = nnx.to_pure_dict(variables)
    num_params = sum(leaf.size for leaf in jax.tree.leaves(params))
    shape = (args.batch[0], args.length[0])
    tokens = np.random.default_rng(0).integers(3, config.num_embeddings, shape, np.int32)
    batch = Batch(inputs=jnp.asarray(tokens), targets=jnp.asarray(tokens))
    loss_fn = make_loss_fn(next_token_loss, graph)

    def summed_loss(params: Params, batch: Batch) -> jax.Array:
        return loss_fn(params, batch)["loss"].total

    start = time.perf_counter()
    compiled = jax.jit(jax.value_and_grad(summed_loss)).lower(params, batch).compile()
    compile_seconds = time.perf_counter() - start
    milliseconds = median_ms(lambda: compiled(params, batch), repeats=args.steps)
    peak = peak_bytes() / 1e9
    memory: Any = compiled.memory_analysis()
    return {
        "shape": str(args.shape),
        "parameters": num_params,
        "batch": f"{shape[0]} x {shape[1]}",
        "dtype": args.dtype,
        "remat": args.remat,
        "stacked": "yes" if args.scan_layers else "no",
        "compile s": compile_seconds,
        "ms": milliseconds,
        **_rates(config, args.dtype, params, shape, milliseconds),
        "temporaries GB": memory.temp_size_in_bytes / 1e9,
        "peak GB": peak,
    }


def _rates(
    config: HymbaConfig, dtype: DType, params: Params, shape: tuple[int, int], milliseconds: float
) -> Row:
    rows, length = shape
    flops_rate = 1e3 * rows * training_flops(config, length) / milliseconds
    return {
        "tokens/s": 1e3 * rows * length / milliseconds,
        "GFLOP/s": flops_rate / 1e9,
        "of matmul rate": flops_rate / best_matmul_rate(config, dtype),
    }


def best_matmul_rate(config: HymbaConfig, dtype: DType) -> float:
    """FLOP/s of the fastest of three of the model's matmuls."""
    hidden, mlp = config.hidden_size, config.mlp_size
    rows = 1024 if jax.default_backend() == "cpu" else 32768
    shapes = ((hidden, mlp), (mlp, hidden), (hidden, config.channels))

    def random(*shape: int) -> jax.Array:
        return jax.random.normal(jax.random.key(0), shape, dtype)

    return max(_matmul_rate(random(rows, n), random(n, m)) for n, m in shapes)


def _matmul_rate(x: jax.Array, kernel: jax.Array) -> float:
    call = jax.jit(matmul)
    milliseconds = short_ms(lambda: call(x, kernel))
    return 2e3 * x.shape[0] * kernel.size / milliseconds


if __name__ == "__main__":
    main(tyro.cli(Args))
