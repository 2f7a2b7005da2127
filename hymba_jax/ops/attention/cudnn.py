"""Attention on NVIDIA GPUs, by cuDNN's fused kernels, which keep no weights.

cuDNN supports causal masks, and masks in memory. A global layer needs only the first, with zero
queries in place of the meta tokens, and so do the first `window` positions of a window layer. Later
queries are computed in blocks of `window`, which attend to the meta tokens, the block before and
their own, with one mask for all blocks: time and memory are linear in the length.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from hymba_jax.ops.attention.reference import attention_mask
from hymba_jax.types import Array, Float, Int


def cudnn(
    query: Float[Array, "batch queries heads head_dim"],
    key: Float[Array, "batch keys kv_heads head_dim"],
    value: Float[Array, "batch keys kv_heads value_dim"],
    *,
    window: int | None,
    num_meta_tokens: int,
    kv_start: Int[Array, "batch"] | None = None,
) -> Float[Array, "batch queries heads value_dim"]:
    """`attention` on NVIDIA GPUs over whole sequences, in float16 or bfloat16.

    Rows are single documents: one mask serves all rows.

    XLA can shard it over devices by batch.

    Raises:
      ValueError: there are fewer queries than keys, or `kv_start` is given: cuDNN's causal mask has
        both begin together.
      NotImplementedError: for float32, and for the gradient with an odd window or an odd number of
        meta tokens.
      RuntimeError: JAX was installed without cuDNN.
    """
    length = key.shape[1]
    if query.shape[1] + num_meta_tokens != length or kv_start is not None:
        raise ValueError("cuDNN's attention needs as many queries as keys, all valid")
    query = jnp.pad(query, ((0, 0), (num_meta_tokens, 0), (0, 0), (0, 0)))
    # JAX requires values as wide as keys for cuDNN. Zeros do not change a score.
    scale, width = query.shape[-1] ** -0.5, value.shape[-1]
    query, key = (_pad(v, 3, width - v.shape[-1]) for v in (query, key))
    attend = partial(jax.nn.dot_product_attention, scale=scale, implementation="cudnn")

    first = length if window is None else min(length, num_meta_tokens + window)
    outputs = [attend(query[:, :first], key[:, :first], value[:, :first], is_causal=True)]
    if window is not None and first < length:
        mask = attention_mask(
            first + jnp.arange(window)[None],
            jnp.arange(first + window),
            window=window,
            num_meta_tokens=num_meta_tokens,
        )
        own, _ = _windows(query, window, num_meta_tokens)
        _, keys = _windows(key, window, num_meta_tokens)
        _, values = _windows(value, window, num_meta_tokens)
        output = attend(own, keys, values, mask=mask[None])
        outputs.append(output.reshape(outputs[0].shape[0], -1, *output.shape[2:]))
    return jnp.concatenate(outputs, axis=1)[:, num_meta_tokens:length]


def supports(
    dtype: Any,
    head_dim: int,
    value_dim: int,
    window: int | None,
    num_meta_tokens: int,
    platform: str,
) -> bool:
    """Whether JAX has cuDNN compute attention and its gradient for such arrays.

    Args:
      platform: as of `target_platform`.
    """
    is_16_bit = dtype in (jnp.float16, jnp.bfloat16)
    widest = 256 if platform == "gpu" else 128  # on Hopper
    is_narrow = head_dim <= value_dim <= widest and value_dim % 8 == 0
    is_even = window is None or window % 2 == num_meta_tokens % 2 == 0
    return is_16_bit and is_narrow and is_even


def _windows(
    v: Float[Array, "batch length heads width"], window: int, num_meta_tokens: int
) -> tuple[Float[Array, "blocks window heads width"], Float[Array, "blocks seen heads width"]]:
    """All blocks but the first of each row, and their keys: meta tokens, the block before, its
    own."""
    meta, rest = v[:, None, :num_meta_tokens], v[:, num_meta_tokens:]
    rest = _pad(rest, 1, -rest.shape[1] % window)
    blocks = rest.reshape(v.shape[0], -1, window, *v.shape[2:])
    before, own = blocks[:, :-1], blocks[:, 1:]
    meta = jnp.broadcast_to(meta, (*own.shape[:2], *meta.shape[2:]))
    seen = jnp.concatenate([meta, before, own], axis=2)
    return own.reshape(-1, *own.shape[2:]), seen.reshape(-1, *seen.shape[2:])


def _pad(v: Array, axis: int, by: int) -> Array:
    return jnp.pad(v, [(0, by if axis == a else 0) for a in range(v.ndim)])
