"""Attention with meta tokens: chooses a back end."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax.numpy as jnp

from hymba_jax.ops.attention.blocks import blocks
from hymba_jax.ops.attention.cudnn import cudnn
from hymba_jax.ops.attention.cudnn import supports as cudnn_supports
from hymba_jax.ops.attention.pallas_gpu import pallas_gpu
from hymba_jax.ops.attention.pallas_gpu import supports as pallas_gpu_supports
from hymba_jax.ops.attention.pallas_tpu import fits_in_vmem, pallas_tpu
from hymba_jax.ops.attention.reference import KVStart, reference
from hymba_jax.ops.attention.sharded import attention_sharded
from hymba_jax.ops.documents import document_starts, first_positions
from hymba_jax.ops.platform import target_platform
from hymba_jax.parallel.shard_map import Axes, length_axis, shard_map
from hymba_jax.types import Array, Bool, Float, Int

IMPLEMENTATIONS: dict[str, Callable[..., Array]] = {
    "blocks": blocks,
    "cudnn": cudnn,
    "pallas_gpu": pallas_gpu,
    "pallas_tpu": pallas_tpu,
    "reference": reference,
}
# cuDNN has no mask for several documents in a row.
SUPPORT_SEGMENT_IDS = ("blocks", "pallas_gpu", "pallas_tpu", "reference")


def attention(
    query: Float[Array, "batch queries heads head_dim"],
    key: Float[Array, "batch keys kv_heads head_dim"],
    value: Float[Array, "batch keys kv_heads value_dim"],
    *,
    meta_key: Float[Array, "meta_tokens kv_heads head_dim"] | None = None,
    meta_value: Float[Array, "meta_tokens kv_heads value_dim"] | None = None,
    window: int | None,
    kv_start: Int[Array, "batch"] | None = None,
    segment_ids: Int[Array, "batch queries"] | None = None,
    implementation: str | None = None,
) -> Float[Array, "batch queries heads value_dim"]:
    """Causal attention, global or in a sliding window, with meta tokens that every query sees.

    If there are fewer queries than keys, they are the last positions. If there are as many, the
    mesh in context may shard their length.

    Args:
      query, key: rotated already; heads are grouped over kv_heads in order.
      meta_key, meta_value: of the meta tokens, the same for all rows; none if absent.
      window: positions before itself that a query attends to, besides the meta tokens; None is all.
      kv_start: the first valid key of each row; earlier ones are masked.
      segment_ids: the document of each query, where rows contain several. A query attends to the
        meta tokens and to keys of its own document. A document starts where the id changes; the
        first one includes the keys before it.
      implementation: a name in IMPLEMENTATIONS; by default the fastest for the platform that
        supports the arguments: `blocks` on CPUs, and elsewhere where no kernel does.

    Raises:
      ValueError: there is no implementation of that name, or it does not support the arguments or
        the platform.
    """
    starts = None if segment_ids is None else document_starts(segment_ids)
    attend: Callable[..., Array] = partial(_behind_meta_tokens, partial(_attend, implementation))
    axis_name = length_axis(key.shape[1]) if query.shape[1] == key.shape[1] else None
    if axis_name is not None:
        attend = partial(attention_sharded, attend, axis_name)
    heads: Axes = ("batch", "length" if axis_name else None, "heads", None)
    axes: dict[str, Axes] = {
        "query": heads,
        "key": heads,
        "value": heads,
        "meta_key": (None, "heads", None),
        "meta_value": (None, "heads", None),
        "kv_start": ("batch",),
        "starts": heads[:2],
    }
    return shard_map(
        partial(_with_documents, attend, axis_name, window=window),
        axes,
        heads,
        query=query,
        key=key,
        value=value,
        # Gradients are summed over rows and devices: in float32.
        meta_key=None if meta_key is None else meta_key.astype(jnp.float32),
        meta_value=None if meta_value is None else meta_value.astype(jnp.float32),
        kv_start=kv_start,
        starts=starts,
    )


def _with_documents(
    attend: Callable[..., Array],
    axis_name: str | None,
    query: Array,
    key: Array,
    value: Array,
    *,
    kv_start: Int[Array, "batch"] | None,
    starts: Bool[Array, "batch queries"] | None,
    **kwargs: Any,
) -> Array:
    """Attention in which no query sees a key before its own document, inside `shard_map`."""
    if starts is None:
        return attend(query, key, value, kv_start=kv_start, **kwargs)
    first = first_positions(starts, axis_name)
    first = jnp.where(first > 0, first + key.shape[1] - query.shape[1], 0)
    if kv_start is not None:
        first = jnp.maximum(first, kv_start[:, None])
    return attend(query, key, value, kv_start=first, **kwargs)


def _behind_meta_tokens(
    attend: Callable[..., Array],
    query: Array,
    key: Array,
    value: Array,
    *,
    meta_key: Array | None,
    meta_value: Array | None,
    kv_start: KVStart | None,
    **kwargs: Any,
) -> Array:
    """Attention with the meta tokens' keys and values prepended.

    This makes one copy, which blocked implementations make anyway.
    """
    if meta_key is None or meta_value is None:
        return attend(query, key, value, num_meta_tokens=0, kv_start=kv_start, **kwargs)
    num_meta_tokens = len(meta_key)
    key, value = (
        jnp.concatenate([jnp.broadcast_to(meta, (len(x), *meta.shape)).astype(x.dtype), x], axis=1)
        for meta, x in ((meta_key, key), (meta_value, value))
    )
    if kv_start is not None:
        kv_start = kv_start + num_meta_tokens
    return attend(query, key, value, num_meta_tokens=num_meta_tokens, kv_start=kv_start, **kwargs)


def _is_by_query(kv_start: KVStart | None) -> bool:
    return kv_start is not None and kv_start.ndim == 2


def _attend(
    implementation: str | None,
    query: Array,
    key: Array,
    value: Array,
    *,
    num_meta_tokens: int,
    kv_start: KVStart | None,
    window: int | None,
) -> Array:
    name = implementation or fastest(query, key, value, kv_start, num_meta_tokens, window)
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"no attention {name!r}; there are {', '.join(IMPLEMENTATIONS)}")
    if _is_by_query(kv_start) and name not in SUPPORT_SEGMENT_IDS:
        choices = ", ".join(SUPPORT_SEGMENT_IDS)
        raise ValueError(f"attention {name!r} does not support segment_ids; these do: {choices}")
    return IMPLEMENTATIONS[name](
        query,
        key,
        value,
        window=window,
        num_meta_tokens=num_meta_tokens,
        kv_start=kv_start,
    )


def fastest(
    query: Float[Array, "batch queries heads head_dim"],
    key: Float[Array, "batch keys kv_heads head_dim"],
    value: Float[Array, "batch keys kv_heads value_dim"],
    kv_start: KVStart | None,
    num_meta_tokens: int,
    window: int | None,
) -> str:
    """The implementation for the platform that is traced for."""
    platform, heads = target_platform(), (query.dtype, query.shape[-1], value.shape[-1])
    if platform == "tpu" and fits_in_vmem(key, value):
        return "pallas_tpu"
    if platform == "gpu" and pallas_gpu_supports(*heads):
        return "pallas_gpu"
    is_full_sequence = query.shape[1] + num_meta_tokens == key.shape[1] and kv_start is None
    can_be_cudnn = cudnn_supports(*heads, window, num_meta_tokens, platform)
    if platform.endswith("gpu") and is_full_sequence and can_be_cudnn:
        return "cudnn"
    return "blocks"
