"""Keys and values, and the cache of those that later tokens see.

A cache has a size known when it is made, and no more slots than its layer can use: every position
of the context in a global layer, the last `window` positions in the others, none in a layer that
reuses its neighbour's. The meta tokens' keys and values are the same for every sequence, and held
once whatever the batch (paper, section 2.4).
"""

from typing import NamedTuple

import jax.numpy as jnp

from hymba_jax.types import Array, Float, Int


class KeyValue(NamedTuple):
    """Of some positions: keys after rotation, and values."""

    key: Float[Array, "batch length kv_heads head_dim"]
    value: Float[Array, "batch length kv_heads value_dim"]


class KVCache(NamedTuple):
    """Keys and values of the tokens so far: those of token t stand in slot t % slots."""

    key: Float[Array, "batch kv_heads slots head_dim"]
    value: Float[Array, "batch kv_heads slots value_dim"]

    @classmethod
    def of(cls, kv: KeyValue) -> "KVCache":
        """A cache of these positions, all its slots filled."""
        return cls(*(a.swapaxes(1, 2) for a in kv))

    def update(
        self, new: KeyValue, start: Int[Array, "batch"], lengths: Int[Array, "batch"]
    ) -> "KVCache":
        """With the first `lengths` positions of `new`, which follow `start` tokens.

        Where more positions than slots are new, the last ones stay.
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
        """The last `slots` positions before `end`, oldest first; those before the first token are
        zero, or left from another sequence."""
        slots = self.key.shape[2]
        order = (end[:, None] + jnp.arange(slots)[None]) % slots
        rows = (jnp.arange(order.shape[0])[:, None], slice(None), order)
        return KeyValue(self.key[rows], self.value[rows])


class AttendedKV(NamedTuple):
    """All keys and values that a layer's queries see, which the layers that reuse them see, too.

    Attributes:
      new: of the positions that the layer is given.
      cache: of the tokens before; None where there are none.
      meta: of the meta tokens, as a batch of one; None while these are computed themselves.
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
