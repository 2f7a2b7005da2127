"""What a kernel tells XLA that it costs, for schedules around it; `hymba compile` reads it, too."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import pallas as pl


def kernel_cost(flops: int, exponentials: int, hbm_bytes: int) -> pl.CostEstimate:
    """Of one call.

    Args:
      flops: of its matmuls.
      exponentials: what the unit for them computes.
      hbm_bytes: of its operands and results, without the padding of tiles.
    """
    return pl.CostEstimate(flops=flops, transcendentals=exponentials, bytes_accessed=hbm_bytes)


def array_bytes(*arrays: Any) -> int:
    """Of arrays that are read or written once; trees of anything with a shape and a dtype."""
    return sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(arrays))


def block_bytes(grid: Sequence[int], specs: Any, arrays: Any) -> int:
    """Of arrays that a TPU copies by blocks, one whenever its index is not that of the program
    before.

    Args:
      specs: a tree of BlockSpecs.
      arrays: those that they are of, in the same order.
    """
    programs = np.indices(grid).reshape(len(grid), -1)
    total = 0
    for spec, array in zip(jax.tree.leaves(specs), jax.tree.leaves(arrays), strict=True):
        index = np.stack(np.broadcast_arrays(*spec.index_map(*programs), programs[0])[:-1])
        copies = 1 + (index[:, 1:] != index[:, :-1]).any(0).sum()
        blocks = len(np.unique(index, axis=1).T)
        total += array_bytes(array) * int(copies) // blocks
    return total


def visited_blocks(
    start: int,
    queries: int,
    keys: int,
    window: int | None,
    block_q: int,
    block_k: int,
    always: int = 0,
) -> int:
    """Pairs of a block of queries and a block of keys that a causal window has, if a row is one
    document.

    Args:
      start: position of the first query, in blocks that `queries` is a multiple of.
      keys: a multiple of their blocks.
      window: as in `attention`.
      always: the first blocks of keys, which every later query sees.
    """
    first = start + np.arange(0, queries, block_q)
    end = np.minimum((first + block_q - 1) // block_k + 1, keys // block_k)
    lowest = np.zeros_like(first) if window is None else np.maximum(first - window, 0)
    begin = np.maximum(lowest // block_k, always)
    return int((np.minimum(always, end) + np.maximum(end - begin, 0)).sum())
