"""Keys and values, and their cache.

A cache has a fixed number of slots: the whole context in a global layer, the last `window`
positions in the others, none in a layer that reuses its neighbour's. The meta tokens' keys and
values are the same for every sequence and stored once for the batch (paper, section 2.4).
"""

from typing import NamedTuple

import jax.numpy as jnp

from hymba_jax.types import Array, Float, Int


class KeyValue(NamedTuple):
    """Keys (rotated) and values of some positions."""

    key: Float[Array, "batch length kv_heads head_dim"]
    value: Float[Array, "batch length kv_heads value_dim"]


class KVCache(NamedTuple):
    """Keys and values of the tokens so far: token t is in slot t % slots."""

    key: Float[Array, "batch kv_heads slots head_dim"]
    value: Float[Array, "batch kv_heads slots value_dim"]

    @classmethod
    def of(cls, kv: KeyValue) -> "KVCache":
        """A cache whose slots are filled with these positions."""
        return cls(*(a.swapaxes(1, 2) for a in kv))

    def update(
        self, new: KeyValue, start: Int[Array, "batch"], lengths: Int[Array, "batch"]
    ) -> "KVCache":
        """The cache after the first `lengths` positions of `new`, which follow `start` tokens.

        If these are more than its slots, the last ones are kept.
        """
        batch, length, kv_heads = new.key.shape[:3]
        slots = self.key.shape[2]
        i, lengths = jnp.arange(length)[None], lengths[:, None]
        stays = (i < lengths) & (i >= lengths - slots)
        slot = jnp.where(stays, (start[:, None] + i) % slots, slots)  # there is no slot `slots`
        # One index for each head, too: else XLA:TPU lays out the whole cache for the update.
        heads = jnp.arange(kv_heads)[None, :, None]
        place = (jnp.arange(batch)[:, None, None], heads, slot[:, None])
        key, value = (a.swapaxes(1, 2) for a in new)
        return KVCache(
            self.key.at[place].set(key.astype(self.key.dtype), mode="drop"),
            self.value.at[place].set(value.astype(self.value.dtype), mode="drop"),
        )

    def in_order(self, end: Int[Array, "batch"]) -> KeyValue:
        """The last `slots` positions before `end`, oldest first; slots before the first token are
        zero or stale."""
        slots = self.key.shape[2]
        order = (end[:, None] + jnp.arange(slots)[None]) % slots
        rows = (jnp.arange(order.shape[0])[:, None], slice(None), order)
        return KeyValue(self.key[rows], self.value[rows])


class AttendedKV(NamedTuple):
    """Keys and values that a layer attends to, passed on to layers that reuse them.

    Attributes:
      new: of the positions that the layer is given.
      cache: of the tokens before; None if there are none.
      meta: of the meta tokens, batch 1; None while the meta tokens themselves are computed.
    """

    new: KeyValue
    cache: KVCache | None
    meta: KVCache | None

    def tokens(self, start: Int[Array, "batch"] | None) -> tuple[KeyValue, Array | None]:
        """Of the tokens in order of position, and the first valid one of each row.

        Args:
          start: tokens before the new positions.
        """
        if self.cache is None or start is None:
            return self.new, None
        slots = self.cache.key.shape[2]
        parts = zip(self.cache.in_order(start), self.new, strict=True)
        both = (jnp.concatenate([a.astype(b.dtype), b], axis=1) for a, b in parts)
        return KeyValue(*both), slots - jnp.minimum(start, slots)
