"""The SSD recurrence of Mamba2: matmuls in chunks beside one position after another.

python benchmarks/ssd.py [--batch 1 --length 1024 --heads 24 --state 128] [--json FILE]
"""

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

from hymba_jax.ops.ssd import ssd
from hymba_jax.types import Array


@dataclass(frozen=True)
class Options:
    """Sizes; by default one sequence through a layer of a 130M Mamba2."""

    batch: int = 1
    length: int = 1024
    heads: int = 24
    head_dim: int = 64
    groups: int = 1
    state: int = 128
    repeats: int = 5
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
    first, second = rows
    for column in ("forward ms", "+ backward ms"):
        print(f"{column}: {float(first[column]) / float(second[column]):.1f} times as fast")
    sizes = f"B={options.batch} L={options.length} heads={options.heads} P={options.head_dim}"
    title = f"SSD, {sizes} G={options.groups} N={options.state}, float32"
    report(title, rows, options.json)


if __name__ == "__main__":
    main(tyro.cli(Options))
