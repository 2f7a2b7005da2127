"""What every layer knows of the positions that it is given."""

from typing import NamedTuple

from hymba_jax.model.rope import Rope
from hymba_jax.types import Array, Int


class Context(NamedTuple):
    """Of a batch of meta tokens, or of tokens.

    Attributes:
      rope: the positions' rotation.
      start: tokens of each row before these, whose keys and values are in the cache; None where
        there is no cache.
      lengths: valid positions of each row, where padding stands behind them.
      segment_ids: the document of each position, where rows have several.
    """

    rope: Rope
    start: Int[Array, "batch"] | None = None
    lengths: Int[Array, "batch"] | None = None
    segment_ids: Int[Array, "batch length"] | None = None
