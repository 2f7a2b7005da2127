"""The state of a model between tokens. Each kind of head defines its own.

| layer                    | keys and values                 | SSM                         |
|--------------------------|---------------------------------|-----------------------------|
| global                   | every position of the context   | kernel - 1 inputs, a state  |
| sliding window           | the last `window` positions     | the same                    |
| reuses its neighbour's   | none                            | the same                    |

A sequence starts from the state after the meta tokens, which is computed once for a set of
parameters.
"""

from typing import NamedTuple

import jax.numpy as jnp

from hymba_jax.model.kv_cache import AttendedKV, KVCache
from hymba_jax.model.ssm import SSMState
from hymba_jax.types import Array, Float, Int


class LayerOutput(NamedTuple):
    """The output of a mixer or block, with what the layer's next state is made from."""

    x: Float[Array, "batch length hidden"]
    kv: AttendedKV | None
    ssm: SSMState | None


class LayerState(NamedTuple):
    """A layer's state; None for heads that it does not have, and for reused keys and values.

    Attributes:
      kv: keys and values of the tokens so far; of the meta tokens, in their own state.
      ssm: state after the last of them.
    """

    kv: KVCache | None = None
    ssm: SSMState | None = None

    def update(
        self, output: LayerOutput, start: Int[Array, "batch"], lengths: Int[Array, "batch"]
    ) -> "LayerState":
        """The state after the first `lengths` positions of an output, which follow `start`."""
        kv, ssm = self.kv, self.ssm
        if kv is not None and output.kv is not None:
            kv = kv.update(output.kv.new, start, lengths)
        if ssm is not None and output.ssm is not None:
            ssm = ssm.update(output.ssm)
        return LayerState(kv, ssm)


type MetaState = tuple[LayerState, ...]
"""State of each layer after the meta tokens, with batch 1."""


class ModelState(NamedTuple):
    """State of each layer for a batch of sequences, and the number of tokens of each."""

    layers: tuple[LayerState, ...]
    lengths: Int[Array, "batch"]

    def initialize(self, meta: MetaState) -> "ModelState":
        """The state before the first token of each sequence."""
        layers = (
            layer._replace(ssm=layer.ssm and start.ssm and layer.ssm.update(start.ssm))
            for layer, start in zip(self.layers, meta, strict=True)
        )
        return ModelState(tuple(layers), jnp.zeros_like(self.lengths))
