"""The SSD recurrence of Mamba2: matmuls in chunks beside one position after another.

python benchmarks/ssd.py [--batch 1 --length 1024 --heads 24 --state 128] [--json FILE]
python benchmarks/ssd.py --transformers PYTHON  # and whole layers, beside those of transformers
"""

import json
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from _report import Row, measure, report
from flax import nnx

from hymba_jax.config import ComputeConfig, HymbaConfig, SSMConfig
from hymba_jax.model.context import Context
from hymba_jax.model.mixer import make_mixer
from hymba_jax.model.rope import make_rope
from hymba_jax.model.state import LayerState
from hymba_jax.ops.ssd import ssd
from hymba_jax.types import Array


@dataclass(frozen=True)
class Options:
    """Sizes; by default one sequence through a layer of a 130M Mamba2.

    Attributes:
      transformers: a Python with torch and transformers, whose Mamba2 layer is timed beside the
        native one, in a process of its own.
    """

    batch: int = 1
    length: int = 1024
    heads: int = 24
    head_dim: int = 64
    groups: int = 1
    state: int = 128
    repeats: int = 5
    transformers: str = ""
    json: Path | None = None


def make_inputs(options: Options) -> tuple[Array, tuple[Array, ...]]:
    """A cotangent of y, and x, dt, A, B and C as at the start of training."""
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> Array:
        size = (options.batch, options.length, *shape)
        return jnp.asarray(rng.normal(size=size), jnp.float32)

    A = -jnp.asarray(rng.uniform(1, 16, options.heads), jnp.float32)
    dy, x = (normal(options.heads, options.head_dim) for _ in range(2))
    B, C = (normal(options.groups, options.state) for _ in range(2))
    return dy, (x, normal(options.heads) - 4, A, B, C)


def with_gradient(scan: Callable[..., tuple[Array, Array]]) -> Callable[..., Any]:
    """y and the gradient of every input, from y's cotangent and the inputs."""

    def function(dy: Array, *inputs: Array) -> tuple[Array, tuple[Array, ...]]:
        y, vjp = jax.vjp(lambda *v: scan(*v)[0], *inputs)
        return y, vjp(dy)

    return function


def native_layer(options: Options) -> Row:
    """A Mamba2 layer without norm and residual: forward, and the gradients of all parameters."""
    hidden = options.heads * options.head_dim // 2
    ssm = SSMConfig(state_size=options.state, head_dim=options.head_dim, groups=options.groups)
    config = HymbaConfig(hidden_size=hidden, layers="S-", ssm=ssm, num_meta_tokens=0)
    mixer = make_mixer(config, config.layer_specs[0], ComputeConfig(), nnx.Rngs(0))
    graph, params = nnx.split(mixer)
    rope = make_rope(config, jnp.arange(options.length)[None], options.length)

    def forward(params: Any, x: Array) -> Array:
        return nnx.merge(graph, params)(x, Context(rope), LayerState(), None, None).x

    def loss(params: Any, x: Array) -> Array:
        return (forward(params, x) ** 2).sum()

    size = (options.batch, options.length, hidden)
    x = jnp.asarray(np.random.default_rng(0).normal(size=size), jnp.float32)
    gradients = jax.grad(loss, argnums=(0, 1))
    return {
        "layer": "hymba_jax",
        "forward ms": measure(forward, params, x, repeats=options.repeats)[0],
        "+ backward ms": measure(gradients, params, x, repeats=options.repeats)[0],
    }


def transformers_layer(options: Options) -> Row:
    """The same of transformers."""
    sizes = {
        "batch": options.batch,
        "length": options.length,
        "heads": options.heads,
        "head_dim": options.head_dim,
        "groups": options.groups,
        "state": options.state,
        "repeats": options.repeats,
    }
    script = Path(__file__).with_name("_transformers_mamba2.py")
    command = [options.transformers, str(script), json.dumps(sizes)]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    row: Row = json.loads(printed.splitlines()[-1])
    return row


def main(options: Options) -> None:
    dy, inputs = make_inputs(options)
    rows: list[Row] = []
    for name in ("reference", "chunked"):
        scan = partial(ssd, implementation=name)
        forward_ms, forward_mb = measure(scan, *inputs, repeats=options.repeats)
        both_ms, both_mb = measure(with_gradient(scan), dy, *inputs, repeats=options.repeats)
        rows.append(
            {
                "implementation": name,
                "forward ms": forward_ms,
                "forward MB": forward_mb,
                "+ backward ms": both_ms,
                "+ backward MB": both_mb,
            }
        )
    sizes = f"B={options.batch} L={options.length} heads={options.heads} P={options.head_dim}"
    title = f"{sizes} G={options.groups} N={options.state}, float32"
    report(f"SSD, {title}", rows, options.json)
    if options.transformers:
        report(f"Mamba2 layer, {title}", [transformers_layer(options), native_layer(options)])


if __name__ == "__main__":
    main(tyro.cli(Options))
