"""What the attention kernels for GPUs are made of: tiles, streams of blocks, and their matmuls."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from hymba_jax.ops.exp2 import LOG2_E
from hymba_jax.ops.wgmma import ROWS, iota, spread
from hymba_jax.types import Array, Int

WARPGROUPS = 2
SLOTS = 3  # of shared memory for what is fetched


class Sizes(NamedTuple):
    """What is static besides shapes.

    Attributes:
      offset: the position of the first query.
      meta: tokens that every later query sees.
      window: as in `attention`; only the cost depends on it.
      scale: of scores.
      rows: of a warpgroup, as its matrix instructions have.
      keys: that rows of queries take at a time.
      queries: that rows of keys take at a time, as they keep two results in registers.
    """

    offset: int
    meta: int
    window: int | None
    scale: float
    rows: int = 64
    keys: int = 128
    queries: int = 64

    @property
    def block(self) -> int:
        """Rows of a thread block."""
        return WARPGROUPS * self.rows

    @property
    def log2_scale(self) -> float:
        """Of scores of which powers of 2 are taken."""
        return self.scale * LOG2_E

    @property
    def meta_blocks(self) -> int:
        """Blocks of keys that contain meta tokens, and are taken before the others."""
        return -(-self.meta // self.keys)


class Spans(NamedTuple):
    """Blocks of keys that a block of queries meets, or the reverse; and those among them in which
    every query sees every key. Scalars in a kernel, arrays before."""

    begin: Any
    end: Any
    full_begin: Any
    full_end: Any

    def is_full(self, block: Any) -> Any:
        return (block >= self.full_begin) & (block < self.full_end)


def key_spans(
    lowest: Int[Array, "batch queries"], keys: int, sizes: Sizes
) -> Int[Array, "batch query_blocks 4"]:
    """The spans of each block of queries, besides the blocks with meta tokens."""
    of_block = lowest.reshape(lowest.shape[0], -1, sizes.block)
    first = sizes.offset + sizes.block * jnp.arange(of_block.shape[1], dtype=jnp.int32)[None]
    spans = Spans(
        begin=jnp.maximum(of_block.min(2) // sizes.keys, sizes.meta_blocks),
        end=jnp.minimum((first + sizes.block - 1) // sizes.keys + 1, keys // sizes.keys),
        full_begin=jnp.maximum(-(-of_block.max(2) // sizes.keys), sizes.meta_blocks),
        full_end=(first + 1) // sizes.keys,
    )
    return jnp.stack(jnp.broadcast_arrays(*spans), axis=2)


def query_spans(
    lowest: Int[Array, "batch queries"], keys: int, sizes: Sizes
) -> Int[Array, "batch key_blocks 4"]:
    """The spans of each block of keys."""
    of_block = lowest.reshape(lowest.shape[0], 1, -1, sizes.queries)
    block = jnp.arange(of_block.shape[2], dtype=jnp.int32)[None, None]
    first = sizes.block * jnp.arange(keys // sizes.block, dtype=jnp.int32)[None, :, None]
    last = first + sizes.block - 1
    is_reached = (of_block.min(3) <= last) | (first < sizes.meta)
    begin = (first - sizes.offset) // sizes.queries
    full_begin = -(-(last - sizes.offset) // sizes.queries)
    is_partly_masked = (of_block.max(3) > first) & (last >= sizes.meta) & (block >= full_begin)
    spans = Spans(
        begin=jnp.maximum(begin[..., 0], 0),
        end=jnp.max(jnp.where(is_reached, block + 1, 0), axis=2),
        full_begin=full_begin[..., 0],
        full_end=jnp.min(jnp.where(is_partly_masked, block, block.size), axis=2),
    )
    return jnp.stack(jnp.broadcast_arrays(*spans), axis=2)


class Tile:
    """What a warpgroup computes: rows of the result in a row of the batch and a head."""

    def __init__(self, block: Any, spans: Any, sizes: Sizes):
        self.row, self.head = lax.axis_index("batch"), lax.axis_index("heads")
        self.warpgroup = lax.axis_index("warpgroup")
        self.spans = Spans(*(spans[self.row, block, k] for k in range(4)))
        self.sizes = sizes
        self.start = block * sizes.block + self.warpgroup * sizes.rows
        self.rows = pl.ds(self.start, sizes.rows)

    def _masked(
        self, is_full: Any, scores: Array, query_axis: int, query: Any, key: Any, lowest: Any
    ) -> Array:
        """Scores, -inf where the mask is.

        Args:
          query, key: the position of the first.
          lowest: reads that of each query.
        """

        def masked() -> Array:
            queries = iota(scores, query_axis) + query
            keys = iota(scores, 1 - query_axis) + key
            seen = (keys >= spread(lowest(), scores, query_axis)) | (keys < self.sizes.meta)
            return jnp.where(seen & (keys <= queries), scores, -jnp.inf)

        return lax.cond(is_full, lambda: scores, masked)


class QueryTile(Tile):
    """Rows of queries, which pass over blocks of keys: those with meta tokens, and their span."""

    def __init__(self, queries: int, spans: Any, sizes: Sizes):
        # The last block, which without a window sees most, starts first.
        super().__init__(queries // sizes.block - 1 - lax.axis_index("blocks"), spans, sizes)
        self.meta_blocks = jnp.minimum(sizes.meta_blocks, self.spans.end)
        self.steps = self.meta_blocks + jnp.maximum(self.spans.end - self.spans.begin, 0)

    def block(self, i: Any) -> Any:
        """The block of keys of step i."""
        in_span = self.spans.begin + i - self.meta_blocks
        return jnp.where(i < self.meta_blocks, i, in_span)

    def keys(self, i: Any, group: int, *arrays: Any) -> list[Any]:
        """What step i takes of each array of keys."""
        keys = pl.ds(self.block(i) * self.sizes.keys, self.sizes.keys)
        head = lax.div(self.head, jnp.int32(group))
        return [array.at[self.row, keys, head] for array in arrays]

    def numbers(self, ref: Any) -> Array:
        """One for each of its queries."""
        # Less than a cache line, but read once.
        return plgpu.load(ref, layout=ROWS.reduce(1), optimized=False)

    def masked(self, i: Any, scores: Array, lowest: Array) -> Array:
        """The scores of step i, -inf where the mask is."""
        block = self.block(i)
        return self._masked(
            self.spans.is_full(block),
            scores,
            query_axis=0,
            query=self.sizes.offset + self.start,
            key=block * self.sizes.keys,
            lowest=lambda: lowest,
        )


class KeyTile(Tile):
    """Rows of keys, which pass over blocks of queries of every head that shares them."""

    def __init__(self, group: int, spans: Any, sizes: Sizes):
        super().__init__(lax.axis_index("blocks"), spans, sizes)
        self.group = group
        self.steps = group * jnp.maximum(self.spans.end - self.spans.begin, 0)

    def block(self, i: Any) -> Any:
        """The block of queries of step i."""
        return self.spans.begin + lax.div(i, jnp.int32(self.group))

    def queries(
        self, i: Any, query: Any, doutput: Any, log_sum: Any, mean: Any, lowest: Any
    ) -> list[Any]:
        """What step i takes of each array of queries."""
        queries = pl.ds(self.block(i) * self.sizes.queries, self.sizes.queries)
        head = self.head * self.group + lax.rem(i, jnp.int32(self.group))
        rows = [array.at[self.row, queries, head] for array in (query, doutput)]
        numbers = [array.at[self.row, head, queries] for array in (log_sum, mean)]
        return [*rows, *numbers, lowest.at[self.row, queries]]

    def numbers(self, ref: Any) -> Array:
        """One for each query of a step."""
        return plgpu.load(ref, layout=ROWS.reduce(0))

    def masked(self, i: Any, scores: Array, lowest: Any) -> Array:
        """The scores of step i, -inf where the mask is."""
        block = self.block(i)
        return self._masked(
            self.spans.is_full(block),
            scores,
            query_axis=1,
            query=self.sizes.offset + block * self.sizes.queries,
            key=self.start,
            lowest=lambda: self.numbers(lowest),
        )


class Stream(NamedTuple):
    """Slots of shared memory that the first warpgroup has filled, and both read."""

    slots: Any
    full: Any
    free: Any

    @staticmethod
    def scratch(*slots: Any) -> "Stream":
        """What to allocate for it."""
        full = plgpu.Barrier(num_arrivals=len(slots), num_barriers=SLOTS)
        return Stream(slots, full, plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=SLOTS))

    def run(
        self,
        steps: Any,
        source: Callable[[Any], Sequence[Any]],
        step: Callable[..., Any],
        carry: Any,
    ) -> Any:
        """`carry = step(i, slots, carry)` in each warpgroup.

        Args:
          source: what slots hold in step i, in global memory.
        """
        fetches = lax.axis_index("warpgroup") == 0

        def fetch(i: Any) -> None:
            @pl.when(fetches & (i < steps))
            def _() -> None:
                slot = _slot(i)

                @pl.when(i >= SLOTS)
                def _() -> None:
                    plgpu.barrier_wait(self.free.at[slot])

                for ref, into in zip(source(i), self.slots, strict=True):
                    plgpu.copy_gmem_to_smem(ref, into.at[slot], self.full.at[slot])

        def one(i: Any, carry: Any) -> Any:
            slot = _slot(i)
            # Into the slot of the step before, which the other warpgroup may still compute.
            fetch(i + SLOTS - 1)
            plgpu.barrier_wait(self.full.at[slot])
            carry = step(i, [ref.at[slot] for ref in self.slots], carry)
            plgpu.barrier_arrive(self.free.at[slot])
            return carry

        for i in range(SLOTS - 1):
            fetch(jnp.int32(i))
        return lax.fori_loop(0, steps, one, carry)


def _slot(i: Any) -> Any:
    return lax.rem(i, jnp.int32(SLOTS))


def row_numbers(sizes: Sizes, value: float) -> Array:
    """One for each row of a warpgroup."""
    return plgpu.layout_cast(jnp.full(sizes.rows, value, jnp.float32), ROWS.reduce(1))


def put(rows: Array, staged: Any, into: Any) -> None:
    """Writes rows to global memory by way of shared memory."""
    staged[...] = rows.astype(staged.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(staged, into)
    plgpu.wait_smem_to_gmem(0)


def kernel(
    body: Any, out_type: Any, grid: dict[str, int], cost: pl.CostEstimate, **scratch: Any
) -> Callable[..., Any]:
    """A kernel of `WARPGROUPS` in each block of the grid."""
    return plgpu.kernel(
        body,
        out_type=out_type,
        scratch_types=scratch,
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        num_threads=WARPGROUPS,
        thread_name="warpgroup",
        cost_estimate=cost,
        # The exponential unit, which errs by 2**-22.
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )
