"""Keys and values, and their cache.

A cache has a fixed number of slots: the whole context in a global layer, the last `window`
positions in the others, none in a layer that reuses its neighbour's. The meta tokens' keys and
values are the same for every sequence and stored once for the batch (paper, section 2.4).

A cache of 8-bit integers has a scale for each head of each token. New keys and values are rounded
before anything attends to them, so that it does not matter in which chunks a sequence comes.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from hymba_jax.ops.int8_rows import Int8Rows
from hymba_jax.types import Array, Float, Int


class KeyValue(NamedTuple):
    """Keys (rotated) and values of some positions."""

    key: Float[Array, "batch length kv_heads head_dim"]
    value: Float[Array, "batch length kv_heads value_dim"]

    def astype(self, dtype: DTypeLike) -> "KeyValue":
        return KeyValue(self.key.astype(dtype), self.value.astype(dtype))


class Int8KeyValue(NamedTuple):
    """The same in 8 bits."""

    key: Int8Rows
    value: Int8Rows

    def astype(self, dtype: DTypeLike) -> KeyValue:
        return KeyValue(self.key.astype(dtype), self.value.astype(dtype))


class KVCache(NamedTuple):
    """Keys and values of the tokens so far: token t is in slot t % slots."""

    key: Float[Array, "batch kv_heads slots head_dim"] | Int8Rows
    value: Float[Array, "batch kv_heads slots value_dim"] | Int8Rows

    @classmethod
    def of(cls, kv: KeyValue | Int8KeyValue) -> "KVCache":
        """A cache whose slots are filled with these positions."""
        return cls(*jax.tree.map(lambda a: a.swapaxes(1, 2), kv))

    @property
    def slots(self) -> int:
        return jax.tree.leaves(self.key)[0].shape[2]

    def rounded(self, new: KeyValue) -> KeyValue | Int8KeyValue:
        """Keys and values of new positions as the cache will hold them."""
        if isinstance(self.key, Int8Rows):
            return Int8KeyValue(Int8Rows.of(new.key), Int8Rows.of(new.value))
        return new

    def update(
        self, new: KeyValue | Int8KeyValue, start: Int[Array, "batch"], lengths: Int[Array, "batch"]
    ) -> "KVCache":
        """The cache after the first `lengths` positions of `new`, which follow `start` tokens.

        If these are more than its slots, the last ones are kept.
        """
        batch, length, kv_heads = jax.tree.leaves(new)[0].shape[:3]
        slots = self.slots
        i, lengths = jnp.arange(length)[None], lengths[:, None]
        stays = (i < lengths) & (i >= lengths - slots)
        slot = jnp.where(stays, (start[:, None] + i) % slots, slots)  # there is no slot `slots`
        # One index for each head, too: else XLA:TPU lays out the whole cache for the update.
        heads = jnp.arange(kv_heads)[None, :, None]
        place = (jnp.arange(batch)[:, None, None], heads, slot[:, None])
        return jax.tree.map(
            lambda cached, a: cached.at[place].set(a.astype(cached.dtype), mode="drop"),
            self,
            KVCache.of(new),
        )

    def in_order(self, end: Int[Array, "batch"], dtype: DTypeLike) -> KeyValue:
        """The last `slots` positions before `end`, oldest first; slots before the first token are
        zero or stale."""
        order = (end[:, None] + jnp.arange(self.slots)[None]) % self.slots
        rows = (jnp.arange(order.shape[0])[:, None], slice(None), order)
        return KeyValue(*(a.astype(dtype) for a in jax.tree.map(lambda a: a[rows], self)))


class AttendedKV(NamedTuple):
    """Keys and values that a layer attends to, passed on to layers that reuse them.

    Attributes:
      new: of the positions that the layer is given.
      cache: of the tokens before; None if there are none.
      meta: of the meta tokens, batch 1; None while the meta tokens themselves are computed.
    """

    new: KeyValue | Int8KeyValue
    cache: KVCache | None
    meta: KVCache | None

    @classmethod
    def of(cls, new: KeyValue, cache: KVCache | None, meta: KVCache | None) -> "AttendedKV":
        """Of a layer that computes its own keys and values, rounded as its cache stores them."""
        return cls(new if cache is None else cache.rounded(new), cache, meta)

    def step_arguments(self, start: Int[Array, "batch"] | None, dtype: DTypeLike) -> dict[str, Any]:
        """Arguments of `attention_step` for one new position, which follows `start` tokens."""
        if self.cache is None or self.meta is None or start is None:
            raise ValueError("there is no cache")
        new = self.new.astype(dtype)
        return {
            "key": new.key[:, 0],
            "value": new.value[:, 0],
            "past_key": self.cache.key,
            "past_value": self.cache.value,
            "past_length": start,
            "meta_key": self.meta.key[0],
            "meta_value": self.meta.value[0],
        }

    def tokens(
        self, start: Int[Array, "batch"] | None, dtype: DTypeLike
    ) -> tuple[KeyValue, Array | None]:
        """Those of the tokens in order of position, and the first valid one of each row.

        Args:
          start: tokens before the new positions; None if there are none.
        """
        new = self.new.astype(dtype)
        if self.cache is None or start is None:
            return new, None
        slots, before = self.cache.slots, self.cache.in_order(start, dtype)
        both = (jnp.concatenate(parts, axis=1) for parts in zip(before, new, strict=True))
        return KeyValue(*both), slots - jnp.minimum(start, slots)
