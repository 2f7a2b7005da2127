"""Compiles a training step for a slice of TPUs that need not be there: what does each chip hold,
and what is sent between them?

python benchmarks/compile_train_step.py [--topology v5e:2x2] [--parallel.tensor 2] [--json FILE]

The layers are the 1.5B's, few of them: a repeated one is compiled once. Collectives are those of
the compiled program, in a loop over layers once; TPUs' sums that each chip keeps a part of are
fusions named all-reduce-scatter. Of each kernel's calls, the first result is shown.
"""

import os
import re
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

# Before JAX starts: the compiler is wanted, not a TPU.
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import tyro
from _report import Row, report, write_json
from jax.experimental import topologies

from hymba_jax.ahead.topology import without_a_tpu
from hymba_jax.config import PRESETS, ComputeConfig
from hymba_jax.parallel import ParallelConfig
from hymba_jax.sharding import batch_sharding, describe_split, make_mesh
from hymba_jax.training.config import TrainingConfig
from hymba_jax.training.optimizer import make_optimizer
from hymba_jax.training.state import make_template
from hymba_jax.training.step import compile_train_step

KERNELS = ("scan_forward", "scan_backward", "splash")
COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute")


@dataclass(frozen=True)
class Args:
    """What to compile for; lengths count no meta tokens."""

    topology: str = "v5e:2x2"
    parallel: ParallelConfig = field(default_factory=lambda: ParallelConfig(tensor=2))
    layers: str = "2*W"
    batch_size: int = 2
    length: int = 1920
    json: Path | None = None


def main(args: Args) -> None:
    without_a_tpu()
    devices = topologies.get_topology_desc(args.topology, platform="tpu").devices
    mesh = make_mesh(devices, args.parallel)
    config = replace(PRESETS["hymba-1.5b"], layers=args.layers, vocab_size=32000)
    training = TrainingConfig(batch_size=args.batch_size)
    optimizer = make_optimizer(training)
    compute = ComputeConfig(dtype="bfloat16", remat="block")
    template = make_template(config, compute, optimizer, mesh)
    start = time.perf_counter()
    with jax.set_mesh(mesh):
        place = batch_sharding(mesh)
        compiled: Any = compile_train_step(template, optimizer, training, args.length, place)
    seconds = time.perf_counter() - start
    text, memory = compiled.as_text(), compiled.memory_analysis()
    sizes: Row = {
        "topology": args.topology,
        "compile s": seconds,
        "arguments MB": memory.argument_size_in_bytes / 1e6,
        "temporaries MB": memory.temp_size_in_bytes / 1e6,
        **{name: len(re.findall(rf" {name}(?:-start)?\(", text)) for name in COLLECTIVES},
        "all-reduce-scatter": len(re.findall(r"^%all-reduce-scatter", text, re.MULTILINE)),
    }
    kernels: Row = {name: " ".join(_results(name, text)) for name in KERNELS}
    print(describe_split(config, mesh, args.length))
    report(f"training step, {args.layers}", [sizes])
    report("kernels of each chip", [kernels])
    if args.json is not None:
        write_json([sizes | kernels], args.json)


def _results(kernel: str, text: str) -> list[str]:
    """Dtype and shape of the first result of each call of a kernel."""
    return re.findall(rf"%\w*{kernel}\S* = \(?(\w+\[[\d,]*\]).* custom-call\(", text)


if __name__ == "__main__":
    main(tyro.cli(Args))
