"""silu of the causal convolution of a sequence whose length is sharded over a mesh axis."""

import jax.numpy as jnp
from jax import lax

from hymba_jax.ops.causal_conv.final_inputs import final_inputs_of
from hymba_jax.ops.causal_conv.reference import causal_conv_reference
from hymba_jax.ops.documents import Documents
from hymba_jax.types import Array, Bool, Float


def causal_conv_sharded(
    axis_name: str,
    x: Float[Array, "batch length channels"],
    weight: Float[Array, "kernel channels"],
    bias: Float[Array, "channels"],
    initial_inputs: Float[Array, "batch kernel-1 channels"],
    starts: Bool[Array, "batch length"] | None,
) -> Float[Array, "batch length channels"]:
    """y of this device's shard, inside `shard_map`; the device before sends its last inputs.

    Args:
      axis_name: the mesh axis that the length is sharded over, in shards of `kernel - 1` positions
        at least.
      x, weight, bias: as in `causal_conv`, of this device's shard.
      initial_inputs: the inputs before the first device's shard.
      starts: where documents start after `initial_inputs`, in this device's shard.
    """
    documents = None if starts is None else Documents(starts, initial_inputs)
    last = final_inputs_of(x, jnp.zeros_like(initial_inputs), documents)
    links = [(i, i + 1) for i in range(lax.axis_size(axis_name) - 1)]
    before = lax.ppermute(last, axis_name, links)
    before = jnp.where(lax.axis_index(axis_name) == 0, initial_inputs, before)
    return causal_conv_reference(x, weight, bias, before, documents)
