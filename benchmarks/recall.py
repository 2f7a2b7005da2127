"""Recall of the paper's designs, small and of equal size, on generated tasks.

    python benchmarks/recall.py [--designs mamba hymba --seeds 0 --steps 400]

Each design has two layers, or two pairs of them, of width 64, and as wide an MLP as makes its
parameters equal to the others'. A cell is a task, a design and a seed; finished cells are lines of
`--output`, and are not trained again, so the same command continues where it was stopped. Accuracy
is over the answers of rows that are not in training.
"""

import dataclasses
import json
import time
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

import jax
import jax.numpy as jnp
import tyro
from _report import Row, report

from hymba_jax.checkpoint.train_state import abstract_train_state, init_state
from hymba_jax.config import AttentionConfig, ComputeConfig, HymbaConfig, SSMConfig
from hymba_jax.config.training import TrainingConfig
from hymba_jax.convert.inspect import count_by_part
from hymba_jax.data.batch import IGNORED_TARGET, Batch, abstract_batch
from hymba_jax.data.recall import RecallName, RecallTask
from hymba_jax.host import prepare_host
from hymba_jax.model import Hymba
from hymba_jax.parallel.mesh import batch_sharding, make_mesh
from hymba_jax.training.loss import Average, Averages, make_loss_fn, next_token_loss
from hymba_jax.training.optimizer import make_optimizer
from hymba_jax.training.step import compile_train_step, make_train_step

DESIGNS: dict[str, dict[str, Any]] = {
    "mamba": {"layers": "2*M"},
    "mamba2": {"layers": "2*S"},
    "llama": {"layers": "2*A"},
    "samba": {"layers": "M L"},
    "sequential": {"layers": "2*A-M"},
    "hymba": {"layers": "G W", "num_meta_tokens": 8},
}
"""What differs between them."""

HELD_OUT_SEED = 2**31  # of rows that no seed of training has


@dataclass(frozen=True)
class Args:
    """Trains and evaluates.

    Attributes:
      tasks, designs, seeds: the cells.
      pairs, length, vocab_size: of the tasks, see `RecallTask`.
      million: parameters of each design, in millions.
      steps: of training.
      batch_size: rows per step.
      output: a line of JSON for each finished cell.
    """

    tasks: tuple[RecallName, ...] = ("mqar",)
    designs: tuple[str, ...] = tuple(DESIGNS)
    seeds: tuple[int, ...] = (0, 1, 2)
    pairs: int = 8
    length: int = 64
    vocab_size: int = 64
    million: float = 1.0
    steps: int = 1000
    batch_size: int = 32
    output: Path = Path("runs/recall.jsonl")


def main(args: Args) -> None:
    prepare_host()
    args.output.parent.mkdir(parents=True, exist_ok=True)
    lines = args.output.read_text().splitlines() if args.output.exists() else []
    finished = {json.dumps(row["cell"]): row for row in map(json.loads, lines)}
    accuracies: dict[tuple[str, str], list[float]] = {}
    for task, design, seed in product(args.tasks, args.designs, args.seeds):
        # All that the accuracy depends on.
        cell = [task, design, seed, args.pairs, args.length, args.vocab_size]
        cell += [args.million, args.steps, args.batch_size]
        key = json.dumps(cell)
        if key not in finished:
            sizes = (args.length, args.pairs, args.vocab_size)
            finished[key] = {"cell": cell, **train(args, RecallTask(task, *sizes), design, seed)}
            with args.output.open("a") as file:
                file.write(json.dumps(finished[key]) + "\n")
            print(json.dumps(finished[key]), flush=True)
        accuracies.setdefault((task, design), []).append(finished[key]["accuracy"])
    rows: list[Row] = [
        {
            "task": task,
            "design": design,
            "seeds": len(several),
            "accuracy": mean(several),
            "lowest": min(several),
            "highest": max(several),
        }
        for (task, design), several in accuracies.items()
    ]
    report(f"recall, {args.pairs} pairs in {args.length} tokens, {args.steps} steps", rows)


def config_of(design: str, args: Args) -> HymbaConfig:
    """The design, with the MLP that makes it as large as the others."""
    base = HymbaConfig(
        vocab_size=args.vocab_size,
        hidden_size=64,
        mlp_size=64,
        attention=AttentionConfig(num_heads=4, num_kv_heads=2, window=16, rope_type="default"),
        ssm=SSMConfig(head_dim=32),
        num_meta_tokens=0,
        max_positions=max(args.length, 64),
    )
    base = dataclasses.replace(base, **DESIGNS[design])
    num_mlps = sum(spec.mlp for spec in base.layer_specs)
    missing = args.million * 1e6 - count_by_part(base).total()
    more = round(missing / (3 * base.hidden_size * num_mlps))
    return dataclasses.replace(base, mlp_size=max(1, base.mlp_size + more))


def recall_objective(model: Hymba, batch: Batch) -> Averages:
    """The loss, and how many of the answers are the likeliest token."""
    is_answer = batch.targets != IGNORED_TARGET
    right = (model(batch.inputs).argmax(-1) == batch.targets) & is_answer
    averages = next_token_loss(model, batch)
    return averages | {"accuracy": Average(right.sum(), is_answer.sum())}


def train(args: Args, task: RecallTask, design: str, seed: int) -> dict[str, float]:
    """Trains one cell: accuracy and loss on 512 rows that are not in training."""
    config, compute, mesh = config_of(design, args), ComputeConfig(), make_mesh(jax.devices()[:1])
    training = TrainingConfig(
        steps=args.steps, batch_size=args.batch_size, schedule="cosine", weight_decay=0.1
    )
    optimizer = make_optimizer(training)
    abstract = abstract_train_state(config, compute, optimizer, mesh)
    state = init_state(config, compute, optimizer, abstract, seed)
    step = compile_train_step(
        make_train_step(
            make_loss_fn(next_token_loss, abstract.graph),
            optimizer,
            micro_batch_size=args.batch_size,
        ),
        abstract.state,
        abstract_batch(args.batch_size, args.length, batch_sharding(mesh)),
    )
    start = time.perf_counter()
    for number in range(args.steps):
        batch = jax.tree.map(jnp.asarray, task.batch(seed, number, args.batch_size))
        state, _ = step(state, batch)
    held_out = jax.tree.map(jnp.asarray, task.batch(HELD_OUT_SEED, 0, 512))
    averages = jax.jit(make_loss_fn(recall_objective, abstract.graph))(state.params, held_out)
    return {
        "accuracy": float(averages["accuracy"].mean),
        "loss": float(averages["loss"].mean),
        "parameters": abstract.num_params,
        "seconds": round(time.perf_counter() - start, 1),
    }


if __name__ == "__main__":
    main(tyro.cli(Args))
