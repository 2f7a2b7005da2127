"""Positions of a batch, as every layer sees them."""

from typing import NamedTuple

from hymba_jax.model.rope import Rope
from hymba_jax.types import Array, Int


class Context(NamedTuple):
    """Positions of a batch of tokens, or of the meta tokens.

    Attributes:
      rope: rotary cos and sin of the positions.
      start: tokens of each row that are in the cache already; None without a cache, or if it is
        empty.
      lengths: valid positions of each row; the rest is padding.
      segment_ids: the document of each position; None if each row is one document.
    """

    rope: Rope
    start: Int[Array, "batch"] | None = None
    lengths: Int[Array, "batch"] | None = None
    segment_ids: Int[Array, "batch length"] | None = None
