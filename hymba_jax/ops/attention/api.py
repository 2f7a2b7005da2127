"""Attention behind meta tokens: one call, a back end for each platform."""

from collections.abc import Callable

from hymba_jax.ops.attention.reference import reference
from hymba_jax.types import Array, Float, Int

IMPLEMENTATIONS: dict[str, Callable[..., Array]] = {"reference": reference}


def attention(
    query: Float[Array, "batch queries heads head_dim"],
    key: Float[Array, "batch keys kv_heads head_dim"],
    value: Float[Array, "batch keys kv_heads value_dim"],
    *,
    window: int | None,
    num_meta_tokens: int,
    query_start: Int[Array, "batch"] | None = None,
    first_key: Int[Array, "batch"] | None = None,
    implementation: str | None = None,
) -> Float[Array, "batch queries heads value_dim"]:
    """Causal attention, global or in a sliding window that never loses the meta tokens.

    Args:
      query, key: rotated already; heads are grouped over kv_heads in order.
      window: positions before itself that a query sees, besides the meta tokens; None sees all.
      num_meta_tokens: the first keys, which every later query sees.
      query_start: where among the keys the first query of each row stands; at the end, so that the
        last query meets the last key, if absent. Keys after a query are not seen.
      first_key: the first key of each row that counts, besides the meta tokens; those between do
        not, whatever numbers they hold.
      implementation: a name in IMPLEMENTATIONS; None takes the fastest that runs here.

    Raises:
      ValueError: there is no implementation of that name.
    """
    name = implementation or "reference"
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"no attention {name!r}; there are {', '.join(IMPLEMENTATIONS)}")
    return IMPLEMENTATIONS[name](
        query,
        key,
        value,
        window=window,
        num_meta_tokens=num_meta_tokens,
        query_start=query_start,
        first_key=first_key,
    )
