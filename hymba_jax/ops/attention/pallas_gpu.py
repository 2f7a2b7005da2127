"""Attention as Mosaic GPU kernels for Hopper: forward and backward, in bfloat16.

A query attends to the meta tokens and to an interval of keys, which ends with its own position and
begins where the window or its document does, whichever is later. So a window and documents are one
integer per query, and the kernels (`gpu_kernels`) skip the blocks that no interval reaches.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from hymba_jax.ops.attention.gpu_kernels import backward_key_value, backward_query, forward
from hymba_jax.ops.attention.gpu_tiles import Sizes
from hymba_jax.ops.attention.reference import KVStart
from hymba_jax.ops.remat import ATTENTION, named
from hymba_jax.types import Array, Float

# What registers and shared memory hold. Narrower heads are padded to a swizzled row, 128 bytes.
_MAX_HEAD_DIM, _MAX_VALUE_DIM = 64, 128
_SWIZZLED = 64


def pallas_gpu(
    query: Float[Array, "batch queries heads head_dim"],
    key: Float[Array, "batch keys kv_heads head_dim"],
    value: Float[Array, "batch keys kv_heads value_dim"],
    *,
    window: int | None,
    num_meta_tokens: int,
    kv_start: KVStart | None = None,
) -> Float[Array, "batch queries heads value_dim"]:
    """`attention` on Hopper GPUs; elsewhere only in Pallas's interpret mode.

    A query without valid keys has output zero.

    Raises:
      ValueError: the arrays are not bfloat16, head_dim is above 64 or value_dim above 128, or it is
        compiled for a CPU outside interpret mode.
    """
    if not supports(query.dtype, query.shape[-1], value.shape[-1]):
        raise ValueError(
            f"attention 'pallas_gpu' supports bfloat16, head_dim up to {_MAX_HEAD_DIM} and "
            f"value_dim up to {_MAX_VALUE_DIM}, not {query.dtype}, {query.shape[-1]} and "
            f"{value.shape[-1]}"
        )
    (batch, queries), offset = query.shape[:2], key.shape[1] - query.shape[1]
    sizes = Sizes(offset, min(num_meta_tokens, key.shape[1]), window, query.shape[-1] ** -0.5)
    lowest = jnp.zeros((batch, queries), jnp.int32)
    if window is not None:
        positions = offset + jnp.arange(queries, dtype=jnp.int32)[None]
        lowest += jnp.maximum(positions - window, 0)
    if kv_start is not None:
        lowest = jnp.maximum(lowest, kv_start[:, None] if kv_start.ndim == 1 else kv_start)
    # Padding keys come after every query. Padding queries must not make the last block see more.
    lowest = jnp.pad(lowest, ((0, 0), (0, -queries % sizes.block)), mode="edge")
    arrays = (_pad(_pad(a, 1, sizes.block), 3, _SWIZZLED) for a in (query, key, value))
    return _attention(*arrays, lowest, sizes)[:, :queries, :, : value.shape[-1]]


def supports(dtype: Any, head_dim: int, value_dim: int) -> bool:
    """Whether there are kernels for such arrays."""
    is_narrow = head_dim <= _MAX_HEAD_DIM and value_dim <= _MAX_VALUE_DIM
    return dtype == jnp.bfloat16 and is_narrow


def _pad(v: Array, axis: int, multiple: int) -> Array:
    """Zeros up to a multiple; arrays that fit are not copied."""
    pads = [(0, 0)] * v.ndim
    pads[axis] = (0, -v.shape[axis] % multiple)
    return jnp.pad(v, pads) if pads[axis][1] else v


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attention(query: Array, key: Array, value: Array, lowest: Array, sizes: Sizes) -> Array:
    return forward(query, key, value, lowest, sizes)[0]


def _attention_fwd(
    query: Array, key: Array, value: Array, lowest: Array, sizes: Sizes
) -> tuple[Array, tuple[Array, ...]]:
    output, log_sum = named(ATTENTION, forward(query, key, value, lowest, sizes))
    return output, (query, key, value, lowest, output, log_sum)


def _attention_bwd(
    sizes: Sizes, residuals: tuple[Array, ...], doutput: Array
) -> tuple[Array, Array, Array, None]:
    query, key, value, lowest, output, log_sum = residuals
    # The derivative of the weights' sum, which is always 1.
    mean = jnp.sum(doutput.astype(jnp.float32) * output.astype(jnp.float32), axis=-1)
    inputs = (query, key, value, doutput, log_sum, mean.swapaxes(1, 2), lowest)
    return backward_query(*inputs, sizes), *backward_key_value(*inputs, sizes), None


_attention.defvjp(_attention_fwd, _attention_bwd)
