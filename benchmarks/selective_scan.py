"""The selective scan: a loop over time, an associative scan, and what training runs, side by side.

python benchmarks/selective_scan.py [--batch 16 --length 256 --channels 512] [--json FILE]
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

from hymba_jax.ops.platform import target_platform
from hymba_jax.ops.selective_scan import selective_scan
from hymba_jax.ops.selective_scan.api import FASTEST
from hymba_jax.types import Array


@dataclass(frozen=True)
class Options:
    """Sizes; by default one sequence through a layer of Hymba-1.5B."""

    batch: int = 1
    length: int = 1024
    channels: int = 3200
    state: int = 16
    repeats: int = 10
    json: Path | None = None


def loop(x: Array, dt: Array, A: Array, B: Array, C: Array) -> tuple[Array, Array]:
    """The recurrence as most people write it: `lax.scan` over time, state (B, E, N)."""
    delta = jax.nn.softplus(dt)

    def step(h: Array, at: tuple[Array, ...]) -> tuple[Array, Array]:
        x, delta, B, C = at
        decay = jnp.exp(delta[:, :, None] * A.T[None])
        h = decay * h + (delta * x)[:, :, None] * B[:, None, :]
        return h, jnp.einsum("ben,bn->be", h, C)

    h = jnp.zeros((x.shape[0], x.shape[2], A.shape[0]))
    h, y = jax.lax.scan(step, h, tuple(jnp.moveaxis(v, 1, 0) for v in (x, delta, B, C)))
    return jnp.moveaxis(y, 0, 1), h


def associative(x: Array, dt: Array, A: Array, B: Array, C: Array) -> tuple[Array, Array]:
    """The recurrence as a parallel prefix over the whole length."""
    delta = jax.nn.softplus(dt)
    decay = jnp.exp(delta[:, :, None] * A[None, None])
    h = (delta * x)[:, :, None] * B[:, :, :, None]

    def combine(left: tuple[Array, Array], right: tuple[Array, Array]) -> tuple[Array, Array]:
        return left[0] * right[0], right[0] * left[1] + right[1]

    _, h = jax.lax.associative_scan(combine, (decay, h), axis=1)
    return jnp.einsum("blne,bln->ble", h, C), h[:, -1]


def with_gradient(scan: Callable[..., tuple[Array, Array]]) -> Callable[..., Any]:
    """y and the gradient of every input, from y's cotangent and the inputs."""

    def function(dy: Array, *inputs: Array) -> tuple[Array, tuple[Array, ...]]:
        y, vjp = jax.vjp(lambda *v: scan(*v)[0], *inputs)
        return y, vjp(dy)

    return function


def make_inputs(
    batch: int, length: int, channels: int, state: int
) -> tuple[Array, tuple[Array, ...]]:
    """A cotangent of y, and x, dt, A, B and C as at the start of training."""
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> Array:
        return jnp.asarray(rng.normal(size=(batch, length, *shape)), jnp.float32)

    A = -jnp.broadcast_to(jnp.arange(1.0, state + 1)[:, None], (state, channels))
    x, dt, dy = normal(channels), normal(channels) - 3, normal(channels)
    return dy, (x, dt, A, normal(state), normal(state))


def costs(scan: Callable[..., Any], dy: Array, inputs: tuple[Array, ...], repeats: int) -> Row:
    """Time and temporaries of the forward pass, and with every gradient."""
    forward_ms, forward_mb = measure(scan, *inputs, repeats=repeats)
    both_ms, both_mb = measure(with_gradient(scan), dy, *inputs, repeats=repeats)
    return {
        "forward ms": forward_ms,
        "forward MB": forward_mb,
        "+ backward ms": both_ms,
        "+ backward MB": both_mb,
    }


def main(options: Options) -> None:
    b, length, e, n = options.batch, options.length, options.channels, options.state
    dy, inputs = make_inputs(b, length, e, n)
    scans: dict[str, Callable[..., tuple[Array, Array]]] = {
        "lax.scan over time": loop,
        "lax.associative_scan": associative,
    }
    fastest = FASTEST.get(target_platform(), "xla")
    for name in dict.fromkeys(("xla", fastest)):
        scans[f"hymba_jax {name}"] = partial(selective_scan, implementation=name)
    rows: list[Row] = [
        {"implementation": name, **costs(scan, dy, inputs, options.repeats)}
        for name, scan in scans.items()
    ]
    report(f"selective scan, B={b} L={length} E={e} N={n}, float32", rows, options.json)


if __name__ == "__main__":
    main(tyro.cli(Options))
