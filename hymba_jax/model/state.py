"""The state of a model between tokens; each kind of head defines its own, in its own file.

A sequence starts from the state after the meta tokens, which is computed once for a set of
parameters.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from hymba_jax.config import CacheFormat
from hymba_jax.model.kv_cache import AttendedKV, KVCache
from hymba_jax.types import Array, Float, Int

RecurrentState = Any
"""State of SSM heads: a named tuple of arrays, each with the batch as its first axis."""


class StateFormats(NamedTuple):
    """What a layer's state is stored in between tokens.

    Attributes:
      dtype: of keys and values, their scales, and the convolution's inputs.
      ssm_dtype: of SSM states, which are computed in float32.
      kv_cache: of keys and values, "float" in `dtype` or "int8".
    """

    dtype: DTypeLike
    ssm_dtype: DTypeLike = "float32"
    kv_cache: CacheFormat = "float"


class LayerOutput(NamedTuple):
    """The output of a mixer or block, with what the layer's next state is made from."""

    x: Float[Array, "batch length hidden"]
    kv: AttendedKV | None
    ssm: RecurrentState | None


class LayerState(NamedTuple):
    """A layer's state; None for heads that it does not have, and for reused keys and values.

    Attributes:
      kv: keys and values of the tokens so far; of the meta tokens, in their own state.
      ssm: state after the last of them.
    """

    kv: KVCache | None = None
    ssm: RecurrentState | None = None

    def update(
        self, output: LayerOutput, start: Int[Array, "batch"], lengths: Int[Array, "batch"]
    ) -> "LayerState":
        """The state after the first `lengths` positions of an output, which follow `start`."""
        kv = self.kv
        if kv is not None and output.kv is not None:
            kv = kv.update(output.kv.new, start, lengths)
        return LayerState(kv, _stored_like(self.ssm, output.ssm))


type MetaState = tuple[LayerState, ...]
"""State of each layer after the meta tokens, with batch 1."""


class ModelState(NamedTuple):
    """State of each layer for a batch of sequences, and the number of tokens of each."""

    layers: tuple[LayerState, ...]
    lengths: Int[Array, "batch"]

    def initialize(self, meta: MetaState) -> "ModelState":
        """The state before the first token of each sequence."""
        layers = (
            layer._replace(ssm=_stored_like(layer.ssm, start.ssm))
            for layer, start in zip(self.layers, meta, strict=True)
        )
        return ModelState(tuple(layers), jnp.zeros_like(self.lengths))


def broadcast_to_batch(state: RecurrentState | None, batch: int) -> RecurrentState | None:
    """The state that SSM heads start from, with a row for each sequence.

    In float32 where all rows share it, as their gradients are summed.
    """

    def broadcast(array: Array) -> Array:
        if len(array) == batch:
            return array
        return jnp.broadcast_to(array.astype(jnp.float32), (batch, *array.shape[1:]))

    return jax.tree.map(broadcast, state)


def _stored_like(old: RecurrentState | None, new: RecurrentState | None) -> RecurrentState | None:
    """The new state in the old one's dtypes, broadcast over its batch."""
    return jax.tree.map(lambda a, b: jnp.broadcast_to(b, a.shape).astype(a.dtype), old, new)
