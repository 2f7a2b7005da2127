"""Training steps of small models on 8 CPU devices, and what XLA makes of them, as text.

`python tests/sharded_step.py` writes tests/snapshots again; read what changed.
"""

import dataclasses
import math
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax
import numpy as np
import optax

from hymba_jax.checkpoint.train_state import TrainState, abstract_train_state, init_state
from hymba_jax.config import AttentionConfig, ComputeConfig, HymbaConfig, SSMConfig
from hymba_jax.config.parallel import ParallelConfig
from hymba_jax.config.training import TrainingConfig
from hymba_jax.data.batch import Batch, abstract_batch
from hymba_jax.model.sharding import describe_sharding
from hymba_jax.parallel.mesh import batch_sharding, make_mesh
from hymba_jax.training.loss import make_loss_fn, next_token_loss
from hymba_jax.training.optimizer import make_optimizer
from hymba_jax.training.step import compile_train_step, make_train_step

SNAPSHOTS = Path(__file__).parent / "snapshots"
STACKED = 7  # units of layers, a number that no other axis has

# Eight of everything that 8 devices shard.
EVEN = HymbaConfig(
    vocab_size=64,
    hidden_size=32,
    mlp_size=48,
    layers=f"{STACKED}*W",
    attention=AttentionConfig(
        num_heads=8, num_kv_heads=8, window=8, qk_norm="perhead-rms", rope_type="default"
    ),
    num_meta_tokens=5,
)
# As the HF checkpoint, whose heads and vocabulary 2 devices cannot shard.
ODD = dataclasses.replace(
    EVEN,
    vocab_size=61,
    hidden_size=40,
    layers=f"{STACKED}*Ww",
    attention=AttentionConfig(num_heads=10, num_kv_heads=5, window=8, rope_type="default"),
)
# With windows longer than two of 8 shards of a sequence, and shorter than one of 2; meta tokens
# that 2 devices share, and 8 replicate.
LONG = dataclasses.replace(
    EVEN,
    layers=f"G {STACKED}*W",
    attention=dataclasses.replace(EVEN.attention, num_kv_heads=4, window=30),
    num_meta_tokens=6,
)
# Both of them: heads and a vocabulary that 2 devices cannot shard, and meta tokens that they can.
ODD_LONG = dataclasses.replace(
    ODD,
    layers=LONG.layers,
    attention=dataclasses.replace(ODD.attention, window=LONG.attention.window),
    num_meta_tokens=LONG.num_meta_tokens,
)
# Mamba2 alone: 8 heads of two groups, in more chunks than one.
MAMBA2 = dataclasses.replace(
    EVEN,
    layers=f"{STACKED}*S-",
    ssm=SSMConfig(state_size=6, head_dim=8, groups=2),
)
LENGTHS = {EVEN: 21, ODD: 21, LONG: 104, ODD_LONG: 104, MAMBA2: 160}  # tokens of a sequence
CASES = {
    "data-8": (EVEN, ParallelConfig(data=8, fsdp=1)),
    "fsdp-8": (EVEN, ParallelConfig(fsdp=8)),
    "tensor-8": (EVEN, ParallelConfig(tensor=8, fsdp=1)),
    "2x2x2": (EVEN, ParallelConfig(data=2, fsdp=2, tensor=2)),
    "2x2x2-odd": (ODD, ParallelConfig(data=2, fsdp=2, tensor=2)),
    "sequence-8": (LONG, ParallelConfig(fsdp=1, sequence=8)),
    "2x2x2-sequence": (LONG, ParallelConfig(fsdp=2, sequence=2, tensor=2)),
    "2x2x2-odd-sequence": (ODD_LONG, ParallelConfig(fsdp=2, sequence=2, tensor=2)),
    "2x2x2-mamba2": (MAMBA2, ParallelConfig(fsdp=2, sequence=2, tensor=2)),
    "2x2x2-sequence-data": (LONG, ParallelConfig(data=2, fsdp=2, sequence=2)),
}
COLLECTIVE = re.compile(
    r" = (.*?) (all-gather|all-reduce|all-to-all|reduce-scatter|collective-permute)(?:-start)?\("
    r".*?(?:replica_groups|source_target_pairs)=(.*)"
)


class Collective(NamedTuple):
    """One array that a collective of a compiled program gives each device."""

    kind: str
    dtype: str
    shape: tuple[int, ...]
    over: str  # mesh axes

    def __str__(self) -> str:
        shape = ",".join(map(str, self.shape))
        return f"{self.kind} {self.dtype}[{shape}]{self.over and f' over {self.over}'}"


def first_group(groups: str) -> Sequence[int]:
    """The first of some groups of devices, in the words of XLA."""
    if listed := re.match(r"{{([\d,]+)}", groups):
        return _numbers(listed[1])
    if named := re.match(r"mesh\[(.*?)\] {(.*?)}", groups):
        sizes = re.findall(r"('\w+')=(\d+)", named[1])
        ids = np.arange(math.prod(int(size) for _, size in sizes))
        ids = ids.reshape([int(size) for _, size in sizes])
        return ids[tuple(slice(None) if name in named[2] else 0 for name, _ in sizes)].ravel()
    shape, dims, order = re.match(r"\[(.*?)\]<=\[(.*?)\](?:T\((.*?)\))?", groups).groups()
    ids = np.arange(math.prod(_numbers(dims))).reshape(_numbers(dims))
    return ids.transpose(_numbers(order) if order else None).reshape(_numbers(shape))[0]


def _numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


class ShardedStep:
    """A training step, compiled for a mesh of some devices."""

    def __init__(
        self,
        config: HymbaConfig,
        devices: Sequence[jax.Device] | None = None,
        parallel: ParallelConfig | None = None,
    ):
        self.config, self.length = config, LENGTHS[config]
        self.mesh = make_mesh(devices, parallel)
        # One case has all options of how a step computes.
        is_mixed = self.mesh.axis_sizes.count(2) == 3
        self.compute = ComputeConfig(remat="block" if is_mixed else "none")
        self.training = TrainingConfig(
            steps=3,
            batch_size=8,
            gradient_accumulation_steps=2 if is_mixed else 1,
            warmup_fraction=0.0,
            decay_fraction=0.0,
        )
        self.optimizer = make_optimizer(self.training)
        self.abstract = abstract_train_state(config, self.compute, self.optimizer, self.mesh)
        self.place = batch_sharding(self.mesh)

    @cached_property
    def compiled(self) -> jax.stages.Compiled:
        with jax.set_mesh(self.mesh):
            step = make_train_step(
                make_loss_fn(next_token_loss, self.abstract.graph),
                self.optimizer,
                micro_batch_size=self.training.micro_batch_size,
            )
            batch = abstract_batch(self.training.batch_size, self.length, self.place)
            return compile_train_step(step, self.abstract.state, batch)

    def initialize(self) -> TrainState:
        """The state before the first step."""
        with jax.set_mesh(self.mesh):
            return init_state(self.config, self.compute, self.optimizer, self.abstract, seed=0)

    def run(self, state: TrainState) -> tuple[list[float], dict, dict]:
        """The loss of each step, the means of the gradients after the first, all parameters."""
        state = jax.device_put(state, self.abstract.shardings)
        rng, losses, means = np.random.default_rng(0), [], None
        for _ in range(self.training.steps):
            tokens = rng.integers(3, self.config.vocab_size, (8, self.length + 1), np.int32)
            batch = Batch(inputs=tokens[:, :-1], targets=tokens[:, 1:])
            state, metrics = self.compiled(state, jax.device_put(batch, self.place))
            losses.append(float(metrics["loss"].mean))
            if means is None:
                means = jax.device_get(optax.tree.get(state.optimizer, "mu"))
        return losses, means, state.params

    def collectives(self) -> Iterator[Collective]:
        """Those of the compiled program; one of several arrays counts as several."""
        for results, kind, groups in COLLECTIVE.findall(self.compiled.as_text()):
            for dtype, shape in re.findall(r"(\w+)\[([\d,]*)\]", results):
                over = "" if kind == "collective-permute" else self._axes_of(groups)
                yield Collective(kind, dtype, (*_numbers(shape),), over)

    def _axes_of(self, attributes: str) -> str:
        """The mesh axes along which the devices of a group lie."""
        places = np.unravel_index(first_group(attributes), self.mesh.axis_sizes)
        places = zip(self.mesh.axis_names, places, strict=True)
        return " x ".join(name for name, at in places if len({*at}) > 1)

    def describe(self) -> str:
        """What a snapshot holds."""
        lines = [describe_sharding(self.config, self.mesh, self.length), "", "collectives:"]
        for collective, count in sorted(Counter(self.collectives()).items()):
            lines.append(f"{count:4} {collective}")
        lines += ["", "parameters, stacked layers in front:"]
        places = defaultdict(set)
        for path, leaf in jax.tree.leaves_with_path(self.abstract.state.params):
            keys = [str(key.key) for key in path]
            name = ".".join(key for key in keys if not (key.isdigit() or key in _CONTAINERS))
            places[name].add(f"{leaf.shape} {tuple(leaf.sharding.spec)}")
        for name, found in sorted(places.items()):
            lines += [f"  {name} {place}" for place in sorted(found)]
        return "\n".join(lines) + "\n"


_CONTAINERS = ("groups", "group", "blocks")


def main() -> None:
    SNAPSHOTS.mkdir(exist_ok=True)
    for name, (config, parallel) in CASES.items():
        step = ShardedStep(config, parallel=parallel)
        (SNAPSHOTS / f"{name}.txt").write_text(step.describe())


if __name__ == "__main__":
    main()
