"""Attention behind meta tokens: one call, a back end for each platform."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax.numpy as jnp

from hymba_jax.ops.attention.blocks import blocks
from hymba_jax.ops.attention.cudnn import cudnn
from hymba_jax.ops.attention.reference import reference
from hymba_jax.ops.attention.sharded import attention_sharded
from hymba_jax.ops.attention.splash import splash
from hymba_jax.ops.by_device import Axes, by_device, length_axis
from hymba_jax.ops.platform import target_platform
from hymba_jax.types import Array, Float, Int

IMPLEMENTATIONS: dict[str, Callable[..., Array]] = {
    "blocks": blocks,
    "cudnn": cudnn,
    "reference": reference,
    "splash": splash,
}


def attention(
    query: Float[Array, "batch queries heads head_dim"],
    key: Float[Array, "batch keys kv_heads head_dim"],
    value: Float[Array, "batch keys kv_heads value_dim"],
    *,
    window: int | None,
    num_meta_tokens: int,
    first_key: Int[Array, "batch"] | None = None,
    implementation: str | None = None,
) -> Float[Array, "batch queries heads value_dim"]:
    """Causal attention, global or in a sliding window that never loses the meta tokens.

    Where there are fewer queries than keys, the last query meets the last key. Where there are as
    many, the mesh in context may split their length, in parts that hold the meta tokens.

    Args:
      query, key: rotated already; heads are grouped over kv_heads in order.
      window: positions before itself that a query sees, besides the meta tokens; None sees all.
      num_meta_tokens: the first keys, which every later query sees.
      first_key: the first key of each row that counts, besides the meta tokens; those between do
        not, whatever numbers they hold.
      implementation: a name in IMPLEMENTATIONS; the fastest for the platform that can do this if
        absent, which is `blocks` on CPUs.

    Raises:
      ValueError: there is no implementation of that name, or it cannot do this or run here.
    """
    attend: Callable[..., Array] = partial(_attend, implementation)
    axis_name = None
    if query.shape[1] == key.shape[1]:
        axis_name = length_axis(key.shape[1], at_least=num_meta_tokens)
    if axis_name is not None:
        attend = partial(attention_sharded, attend, axis_name)
    heads: Axes = ("batch", "length" if axis_name else None, "heads", None)
    return by_device(
        partial(attend, window=window, num_meta_tokens=num_meta_tokens),
        {"query": heads, "key": heads, "value": heads, "first_key": ("batch",)},
        heads,
        query=query,
        key=key,
        value=value,
        first_key=first_key,
    )


def _attend(
    implementation: str | None,
    query: Array,
    key: Array,
    value: Array,
    *,
    first_key: Array | None = None,
    **kwargs: Any,
) -> Array:
    name = implementation or fastest(query, key, first_key)
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"no attention {name!r}; there are {', '.join(IMPLEMENTATIONS)}")
    return IMPLEMENTATIONS[name](query, key, value, first_key=first_key, **kwargs)


def fastest(
    query: Float[Array, "batch queries heads head_dim"],
    key: Float[Array, "batch keys kv_heads head_dim"],
    first_key: Int[Array, "batch"] | None,
) -> str:
    """The implementation for the platform that is traced for."""
    platform = target_platform()
    if platform == "tpu":
        return "splash"
    whole = query.shape[1] == key.shape[1] and first_key is None
    if platform.endswith("gpu") and whole and query.dtype != jnp.float32:
        return "cudnn"
    return "blocks"
