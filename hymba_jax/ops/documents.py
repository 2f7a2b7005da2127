"""Documents packed into a row, each computed as if it were alone.

A document starts where `segment_ids` change, from the row's initial state, not from zero.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax

from hymba_jax.types import Array, Bool, Float, Int


class Documents(NamedTuple):
    """What a recurrence needs to know about documents.

    The state that documents start from is separate from the one before the first position, as a
    shard of the sequence may begin inside a document.
    """

    starts: Bool[Array, "batch length"]
    state: Float[Array, "batch _ *channels"]


def document_starts(segment_ids: Int[Array, "batch length"]) -> Bool[Array, "batch length"]:
    """Where documents start, but for position 0: it continues from the initial state."""
    before = jnp.roll(segment_ids, 1, axis=1)
    return (segment_ids != before) & (jnp.arange(segment_ids.shape[1]) > 0)[None]


def first_positions(
    starts: Bool[Array, "batch length"], axis_name: str | None = None
) -> Int[Array, "batch length"]:
    """The position at which the document of each position starts; 0 in the row's first one.

    Args:
      axis_name: the mesh axis that the length is sharded over, if this is a device's shard.
    """
    device = 0 if axis_name is None else lax.axis_index(axis_name)
    positions = device * starts.shape[1] + jnp.arange(starts.shape[1])
    firsts = lax.cummax(jnp.where(starts, positions[None], 0), axis=1)
    if axis_name is None:
        return firsts
    latest = lax.all_gather(firsts[:, -1], axis_name)
    is_before = jnp.arange(len(latest)) < device
    return jnp.maximum(firsts, jnp.where(is_before[:, None], latest, 0).max(0)[:, None])
