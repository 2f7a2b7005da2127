"""Attention behind meta tokens: one call, a back end for each platform."""

from collections.abc import Callable

from hymba_jax.ops.attention.reference import reference
from hymba_jax.types import Array, Float

IMPLEMENTATIONS: dict[str, Callable[..., Array]] = {"reference": reference}


def attention(
    query: Float[Array, "batch length heads head_dim"],
    key: Float[Array, "batch length kv_heads head_dim"],
    value: Float[Array, "batch length kv_heads value_dim"],
    *,
    window: int | None,
    num_meta_tokens: int,
    implementation: str | None = None,
) -> Float[Array, "batch length heads value_dim"]:
    """Causal attention, global or in a sliding window that never loses the meta tokens.

    Args:
      query, key: rotated already; heads are grouped over kv_heads in order.
      window: positions before itself that a query sees, besides the meta tokens; None sees all.
      num_meta_tokens: the first positions, which every later position sees.
      implementation: a name in IMPLEMENTATIONS; None takes the fastest that runs here.

    Raises:
      ValueError: there is no implementation of that name.
    """
    name = implementation or "reference"
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"no attention {name!r}; there are {', '.join(IMPLEMENTATIONS)}")
    return IMPLEMENTATIONS[name](query, key, value, window=window, num_meta_tokens=num_meta_tokens)
