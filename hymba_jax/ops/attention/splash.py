"""Attention on TPUs, by the splash attention kernels that come with JAX.

They skip fully masked blocks, so that a window costs time linear in the length, and store no
weights: the backward pass recomputes them.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import (
    BlockSizes,
    Mask,
    MultiHeadMask,
    SegmentIds,
    make_splash_mha_single_device,
)

from hymba_jax.types import Array, Bool, Float, Int

# Block sizes. Larger blocks compute more masked scores in a window; smaller ones need more
# instructions per score, though theirs spill less to VMEM.
_BLOCK = 512
_LANES = 128  # what a block is a multiple of


def splash(
    query: Float[Array, "batch queries heads head_dim"],
    key: Float[Array, "batch keys kv_heads head_dim"],
    value: Float[Array, "batch keys kv_heads value_dim"],
    *,
    window: int | None,
    num_meta_tokens: int,
    kv_start: Int[Array, "batch"] | None = None,
) -> Float[Array, "batch queries heads value_dim"]:
    """`attention` on TPUs.

    Rows are single documents: the kernels compare segments for equality, so that documents could
    not share the meta tokens.

    Raises:
      ValueError: compiled for a CPU outside Pallas's interpret mode.
    """
    _, queries, heads, head_dim = query.shape
    start = key.shape[1] - queries
    # Causality masks the keys that pad the last block.
    query = _whole_blocks(query * head_dim**-0.5)
    key, value = _whole_blocks(key), _whole_blocks(value)
    mask = _WindowAndMetaTokens(start, query.shape[2], key.shape[2], window, num_meta_tokens)
    block_q, block_k = _block(mask.queries), _block(mask.keys)
    kernel = make_splash_mha_single_device(
        MultiHeadMask((mask,) * heads),
        block_sizes=BlockSizes(
            block_q=block_q,
            block_kv=block_k,
            block_q_dkv=block_q,
            block_kv_dkv=block_k,
            block_q_dq=block_q,
            block_kv_dq=block_k,
        ),
    )
    segments = None
    if kv_start is not None:
        positions = jnp.arange(mask.keys)[None]
        valid = (positions >= kv_start[:, None]) | (positions < num_meta_tokens)
        ones = jnp.ones((query.shape[0], mask.queries), jnp.int32)
        segments = SegmentIds(q=ones, kv=valid.astype(jnp.int32))
    output = jax.vmap(kernel)(query, key, value, segments)
    return output[:, :, :queries].swapaxes(1, 2)


@dataclass(frozen=True)
class _WindowAndMetaTokens(Mask):
    """The mask, which the kernels compute from positions and never store."""

    start: int  # position of the first query
    queries: int
    keys: int
    window: int | None
    num_meta_tokens: int

    @property
    def shape(self) -> tuple[int, ...]:
        return self.queries, self.keys

    # The kernels access this and the next by name.
    @property
    def q_sequence(self) -> Int[np.ndarray, " queries"]:
        return np.arange(self.start, self.start + self.queries, dtype=np.int32)

    def mask_function(
        self, query: Int[Array | np.ndarray, "#a #b"], key: Int[Array | np.ndarray, "#a #b"]
    ) -> Bool[Array | np.ndarray, "a b"]:
        causal = key <= query
        if self.window is None:
            return causal
        return causal & ((query - key <= self.window) | (key < self.num_meta_tokens))

    def __getitem__(self, index: tuple[slice, slice]) -> Bool[np.ndarray, "queries keys"]:
        rows, columns = index
        keys = np.arange(self.keys, dtype=np.int32)
        return np.asarray(self.mask_function(self.q_sequence[rows, None], keys[None, columns]))


def _block(length: int) -> int:
    return min(_BLOCK, -(-length // _LANES) * _LANES)


def _whole_blocks(
    v: Float[Array, "batch length heads width"],
) -> Float[Array, "batch heads length_of_blocks width"]:
    v = v.swapaxes(1, 2)
    length = v.shape[2]
    return jnp.pad(v, ((0, 0), (0, 0), (0, -length % _block(length)), (0, 0)))
