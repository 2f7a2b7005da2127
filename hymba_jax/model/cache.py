"""What a text leaves behind for the tokens after it: keys and values, and the state of the SSM.

Everything has a size known when it is made, and no more than the architecture needs:

| layer                          | keys and values                 | SSM                        |
|--------------------------------|---------------------------------|----------------------------|
| global                         | every position of the context   | kernel - 1 inputs, a state |
| sliding window                 | the last `window` positions     | the same                   |
| reuses its neighbour's         | none                            | the same                   |

Meta tokens come first in every text, so what they leave behind is computed once for a set of
parameters (`Prefix`), and their keys and values are held once, whatever the batch (paper,
section 2.4).
"""

from collections.abc import Iterator
from typing import NamedTuple

import jax.numpy as jnp
from jax.typing import DTypeLike

from hymba_jax.config import HymbaConfig
from hymba_jax.layer_pattern import LayerSpec
from hymba_jax.types import Array, Float, Int


class KeyValue(NamedTuple):
    """What neighbouring layers share: keys after rotation, and values."""

    key: Float[Array, "batch length kv_heads head_dim"]
    value: Float[Array, "batch length kv_heads value_dim"]


class KeyValueCache(NamedTuple):
    """Keys and values of the text so far: position p of the text stands in slot p % slots."""

    key: Float[Array, "batch kv_heads slots head_dim"]
    value: Float[Array, "batch kv_heads slots value_dim"]

    def write(
        self, new: KeyValue, start: Int[Array, "batch"], counts: Int[Array, "batch"]
    ) -> "KeyValueCache":
        """Puts the first `counts` positions of `new`, which follow position `start`, into slots.

        Where more positions than slots are new, the last ones stay.
        """
        batch, length, kv_heads = new.key.shape[:3]
        slots = self.key.shape[2]
        i, counts = jnp.arange(length)[None], counts[:, None]
        stays = (i < counts) & (i >= counts - slots)
        slot = jnp.where(stays, (start[:, None] + i) % slots, slots)  # there is no slot `slots`
        # One index for each head, too: else XLA:TPU lays out the whole cache for the update.
        heads = jnp.arange(kv_heads)[None, :, None]
        place = (jnp.arange(batch)[:, None, None], heads, slot[:, None])
        key, value = (a.swapaxes(1, 2) for a in new)
        return KeyValueCache(
            self.key.at[place].set(key.astype(self.key.dtype), mode="drop"),
            self.value.at[place].set(value.astype(self.value.dtype), mode="drop"),
        )

    def in_slots(self, batch: int) -> KeyValue:
        """All slots as they lie, the same for every row of a batch."""
        key, value = (jnp.broadcast_to(a, (batch, *a.shape[1:])).swapaxes(1, 2) for a in self)
        return KeyValue(key, value)

    def in_order(self, end: Int[Array, "batch"]) -> KeyValue:
        """The last `slots` positions before `end`, oldest first; those before the text are zero
        or left from another one."""
        slots = self.key.shape[2]
        order = (end[:, None] + jnp.arange(slots)[None]) % slots
        rows = (jnp.arange(order.shape[0])[:, None], slice(None), order)
        return KeyValue(self.key[rows], self.value[rows])


class SSMState(NamedTuple):
    """The last inputs of the convolution, and the state of the recurrence."""

    conv_inputs: Float[Array, "batch kernel-1 channels"]
    ssm_state: Float[Array, "batch state channels"]

    def replaced_by(self, new: "SSMState") -> "SSMState":
        """The new state in this one's dtypes, broadcast over its batch."""
        return SSMState(
            *(jnp.broadcast_to(b, a.shape).astype(a.dtype) for a, b in zip(self, new, strict=True))
        )


class LayerCache(NamedTuple):
    """What one layer remembers; None where it has no such heads, or reads its neighbour's."""

    kv: KeyValueCache | None
    ssm: SSMState | None

    def after(
        self,
        kv: KeyValue | None,
        ssm: SSMState | None,
        start: Int[Array, "batch"],
        counts: Int[Array, "batch"],
    ) -> "LayerCache":
        """The cache after `counts` more positions, which follow position `start`.

        Args:
          kv: keys and values of these positions; left alone by a layer that reuses them.
          ssm: the state after these positions.
        """
        return LayerCache(
            self.kv and kv and self.kv.write(kv, start, counts),
            self.ssm and ssm and self.ssm.replaced_by(ssm),
        )


class Cache(NamedTuple):
    """What all layers remember of a batch of texts, and the texts' lengths in tokens."""

    layers: tuple[LayerCache, ...]
    lengths: Int[Array, "batch"]


type Prefix = tuple[LayerCache, ...]
"""What the meta tokens leave behind, as a batch of one."""


class Past(NamedTuple):
    """What attention reads besides the new tokens' own keys and values.

    Attributes:
      meta: of the meta tokens, as a batch of one.
      cache: of the text so far; None where there is none yet.
      length: tokens of the text so far.
    """

    meta: KeyValueCache
    cache: KeyValueCache | None
    length: Int[Array, "batch"]

    def followed_by(self, new: KeyValue) -> KeyValue:
        """All keys and values in order of position: meta tokens, text so far, new tokens."""
        parts = [self.meta.in_slots(batch=new.key.shape[0])]
        if self.cache is not None:
            parts.append(self.cache.in_order(self.length))
        return KeyValue(
            *(
                jnp.concatenate([part.astype(last.dtype) for part in (*before, last)], axis=1)
                for *before, last in zip(*parts, new, strict=True)
            )
        )

    def first_key(self) -> Int[Array, "batch"] | None:
        """Where the text so far begins among these, as the cache may have more slots."""
        if self.cache is None:
            return None
        slots = self.cache.key.shape[2]
        return self.meta.key.shape[2] + slots - jnp.minimum(self.length, slots)


class LayerPast(NamedTuple):
    """What a layer reads besides the new tokens: nothing, in training."""

    kv: Past | None = None
    ssm: SSMState | None = None


def empty_cache(
    config: HymbaConfig, batch: int, context: int, dtype: DTypeLike, state_dtype: DTypeLike
) -> Cache:
    """A cache of zeros, for texts of up to `context` tokens.

    Args:
      dtype: of keys, values and inputs of the convolution.
      state_dtype: that the SSM's states are kept in; they are computed in float32.
    """
    window = min(config.attention.window, context)
    layers = tuple(
        _empty_layer(
            config,
            spec,
            batch,
            context if spec.attention == "global" else window,
            dtype,
            state_dtype,
        )
        for spec in config.layer_specs
    )
    return Cache(layers, jnp.zeros(batch, jnp.int32))


def empty_prefix(config: HymbaConfig, dtype: DTypeLike) -> Prefix:
    """Room for what the meta tokens leave behind, all of them in every layer."""
    return tuple(
        _empty_layer(config, spec, 1, config.num_meta_tokens, dtype, jnp.float32)
        for spec in config.layer_specs
    )


def _empty_layer(
    config: HymbaConfig,
    spec: LayerSpec,
    batch: int,
    slots: int,
    dtype: DTypeLike,
    state_dtype: DTypeLike,
) -> LayerCache:
    kv = state = None
    if spec.attention and not spec.reuses_kv:
        shape = (batch, config.attention.num_kv_heads, slots)
        kv = KeyValueCache(
            jnp.zeros((*shape, config.head_dim), dtype),
            jnp.zeros((*shape, config.value_dim), dtype),
        )
    if spec.ssm:
        state = SSMState(
            jnp.zeros((batch, config.ssm.conv_kernel - 1, config.channels), dtype),
            jnp.zeros((batch, config.ssm.state_size, config.channels), state_dtype),
        )
    return LayerCache(kv, state)


def start_cache(cache: Cache, prefix: Prefix) -> Cache:
    """The cache as it stands before the first token of every text: after the meta tokens."""
    layers = tuple(
        layer._replace(ssm=layer.ssm and meta.ssm and layer.ssm.replaced_by(meta.ssm))
        for layer, meta in zip(cache.layers, prefix, strict=True)
    )
    return Cache(layers, jnp.zeros_like(cache.lengths))


def layer_pasts(cache: Cache, prefix: Prefix, *, is_start: bool) -> Iterator[LayerPast]:
    """What each layer reads; one that reuses keys and values reads its neighbour's."""
    kv = None
    for layer, meta in zip(cache.layers, prefix, strict=True):
        if layer.kv is not None and meta.kv is not None:
            kv = Past(meta.kv, None if is_start else layer.kv, cache.lengths)
        yield LayerPast(kv, layer.ssm)
