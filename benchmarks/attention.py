"""Attention in blocks, and what a GPU runs, beside all queries x keys weights at once.

python benchmarks/attention.py [--heads 25 --kv-heads 5] [--dtype bfloat16] [--json FILE]
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

from hymba_jax.config import DType
from hymba_jax.ops.attention import attention
from hymba_jax.ops.attention.api import fastest
from hymba_jax.types import Array


@dataclass(frozen=True)
class Options:
    """Sizes; by default a sequence through a layer of Hymba-125M."""

    heads: int = 8
    kv_heads: int = 4
    head_dim: int = 64
    value_dim: int = 128
    window: int = 1024
    meta: int = 128
    dtype: DType = "float32"
    repeats: int = 10
    json: Path | None = None


# Queries, keys, the first key that counts besides the meta tokens, and whether there is a window:
# training, the beginning of a text, and what follows one that half fills its cache.
CASES = (
    (640, 640, None, True),
    (1152, 1152, None, True),
    (2176, 2176, None, True),
    (2176, 2176, None, False),
    (8320, 8320, None, True),
    (8320, 8320, None, False),
    (1024, 1152, None, True),
    (1024, 2176, 640, True),
)
# The reference holds this many weights of a head at most.
_REFERENCE_LIMIT = 2176**2


def pairs_seen(queries: int, keys: int, first_key: int, window: int, meta: int) -> int:
    """Pairs of a query and a key that it sees."""
    position = np.arange(keys - queries, keys)
    others = position + 1 - np.maximum(first_key, position - window)
    return int(np.sum(np.minimum(meta, position + 1) + np.maximum(others, 0)))


def with_gradient(function: Callable[..., Array]) -> Callable[..., Any]:
    """The output and the gradient of every input, from the output's cotangent and the inputs."""

    def both(doutput: Array, *inputs: Array) -> tuple[Array, tuple[Array, ...]]:
        output, vjp = jax.vjp(function, *inputs)
        return output, vjp(doutput)

    return both


def make_inputs(options: Options, queries: int, keys: int) -> tuple[Array, tuple[Array, ...]]:
    """A cotangent of the output, and queries, keys and values."""
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> Array:
        return jnp.asarray(rng.normal(size=(1, *shape)), options.dtype)

    o = options
    query, doutput = normal(queries, o.heads, o.head_dim), normal(queries, o.heads, o.value_dim)
    key, value = normal(keys, o.kv_heads, o.head_dim), normal(keys, o.kv_heads, o.value_dim)
    return doutput, (query, key, value)


def costs(
    options: Options, name: str, queries: int, keys: int, first_key: int | None, has_window: bool
) -> Row:
    """Time, temporaries, and floating-point operations a second that the mask asks for."""
    window = options.window if has_window else None
    doutput, inputs = make_inputs(options, queries, keys)
    function = partial(
        attention,
        window=window,
        num_meta_tokens=options.meta,
        first_key=None if first_key is None else jnp.full(1, first_key),
        implementation=name,
    )
    forward_ms, forward_mb = measure(function, *inputs, repeats=options.repeats)
    both_ms, both_mb = measure(with_gradient(function), doutput, *inputs, repeats=options.repeats)
    seen = pairs_seen(queries, keys, first_key or options.meta, window or keys, options.meta)
    megaflop = 2 * seen * options.heads / 1e6
    k, v = options.head_dim, options.value_dim
    return {
        "queries": queries,
        "keys": keys,
        "first": first_key or 0,
        "window": str(window),
        "implementation": name,
        "forward ms": forward_ms,
        "GFLOP/s": megaflop * (k + v) / forward_ms,
        "forward MB": forward_mb,
        "+ backward ms": both_ms,
        # The scores are computed once more, and two products for each one forward.
        "+ GFLOP/s": megaflop * (4 * k + 3 * v) / both_ms,
        "+ backward MB": both_mb,
    }


def main(options: Options) -> None:
    rows: list[Row] = []
    for queries, keys, first_key, has_window in CASES:
        fits = queries * keys <= _REFERENCE_LIMIT
        _, (query, key, _) = make_inputs(options, queries, keys)
        first = None if first_key is None else jnp.full(1, first_key)
        chosen = fastest(query, key, first)
        for name in dict.fromkeys((*(("reference",) if fits else ()), "blocks", chosen)):
            rows.append(costs(options, name, queries, keys, first_key, has_window))
    title = f"attention, heads={options.heads} kv_heads={options.kv_heads} meta={options.meta}"
    report(f"{title}, {options.dtype}", rows, options.json)


if __name__ == "__main__":
    main(tyro.cli(Options))
