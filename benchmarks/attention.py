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


# Queries, keys besides the meta tokens, the first valid one, and whether there is a window: whole
# sequences, and what follows one that half fills its cache.
CASES = (
    (512, 512, None, True),
    (1024, 1024, None, True),
    (2048, 2048, None, True),
    (2048, 2048, None, False),
    (8192, 8192, None, True),
    (8192, 8192, None, False),
    (1024, 2048, 512, True),
)
# The reference holds this many weights of a head at most.
_REFERENCE_LIMIT = 2048**2


def pairs_seen(queries: int, keys: int, kv_start: int, window: int, meta: int) -> int:
    """Pairs of a query and a key that it sees."""
    position = np.arange(keys - queries, keys)
    others = position + 1 - np.maximum(kv_start, position - window)
    return int(np.sum(meta + np.maximum(others, 0)))


def attend(
    query: Array, key: Array, value: Array, meta_key: Array, meta_value: Array, **options: Any
) -> Array:
    """`attention` with positional arguments."""
    return attention(query, key, value, meta_key=meta_key, meta_value=meta_value, **options)


def with_gradient(function: Callable[..., Array]) -> Callable[..., Any]:
    """The output and the gradient of every input, from the output's cotangent and the inputs."""

    def both(doutput: Array, *inputs: Array) -> tuple[Array, tuple[Array, ...]]:
        output, vjp = jax.vjp(function, *inputs)
        return output, vjp(doutput)

    return both


def make_inputs(options: Options, queries: int, keys: int) -> tuple[Array, tuple[Array, ...]]:
    """A cotangent of the output, and queries, keys and values, also of meta tokens."""
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> Array:
        return jnp.asarray(rng.normal(size=shape), options.dtype)

    o = options
    query, doutput = (normal(1, queries, o.heads, width) for width in (o.head_dim, o.value_dim))
    key, value = (normal(1, keys, o.kv_heads, width) for width in (o.head_dim, o.value_dim))
    meta_key, meta_value = (normal(o.meta, o.kv_heads, n) for n in (o.head_dim, o.value_dim))
    return doutput, (query, key, value, meta_key, meta_value)


def costs(
    options: Options, name: str, queries: int, keys: int, kv_start: int | None, has_window: bool
) -> Row:
    """Time, temporaries, and FLOP/s of the unmasked scores."""
    window = options.window if has_window else None
    doutput, inputs = make_inputs(options, queries, keys)
    function = partial(
        attend,
        window=window,
        kv_start=None if kv_start is None else jnp.full(1, kv_start),
        implementation=name,
    )
    forward_ms, forward_mb = measure(function, *inputs, repeats=options.repeats)
    both_ms, both_mb = measure(with_gradient(function), doutput, *inputs, repeats=options.repeats)
    seen = pairs_seen(queries, keys, kv_start or 0, window or keys, options.meta)
    megaflop = 2 * seen * options.heads / 1e6
    k, v = options.head_dim, options.value_dim
    return {
        "queries": queries,
        "keys": keys,
        "first": kv_start or 0,
        "window": str(window),
        "implementation": name,
        "forward ms": forward_ms,
        "GFLOP/s": megaflop * (k + v) / forward_ms,
        "forward MB": forward_mb,
        "+ backward ms": both_ms,
        # The scores are computed once more, and two matmuls for each one forward.
        "+ GFLOP/s": megaflop * (4 * k + 3 * v) / both_ms,
        "+ backward MB": both_mb,
    }


def main(options: Options) -> None:
    rows: list[Row] = []
    for queries, keys, kv_start, has_window in CASES:
        fits = queries * keys <= _REFERENCE_LIMIT
        _, (query, key, value, *_) = make_inputs(options, queries, keys)
        first = None if kv_start is None else jnp.full(1, kv_start)
        window = options.window if has_window else None
        chosen = fastest(query, key, value, first, num_meta_tokens=0, window=window)
        for name in dict.fromkeys((*(("reference",) if fits else ()), "blocks", chosen)):
            rows.append(costs(options, name, queries, keys, kv_start, has_window))
    title = f"attention, heads={options.heads} kv_heads={options.kv_heads} meta={options.meta}"
    report(f"{title}, {options.dtype}", rows, options.json)


if __name__ == "__main__":
    main(tyro.cli(Options))
