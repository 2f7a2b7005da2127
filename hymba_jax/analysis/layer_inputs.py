"""What each layer's heads see: the analyses ask for it, one layer at a time."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from hymba_jax.model import Hymba, unstack_layers
from hymba_jax.model.attention import Attention
from hymba_jax.model.block import Block
from hymba_jax.model.kv_cache import KeyValue
from hymba_jax.model.rope import Rope, make_rope
from hymba_jax.types import Array, Float, Int


class LayerInputs(NamedTuple):
    """Inputs of a layer's heads, those of the meta tokens first.

    Attributes:
      x: after the layer's norm.
      rope: rotary cos and sin of all positions.
      kv: keys and values that attention heads attend to, also those of a layer before; None
        without attention heads.
    """

    x: Float[Array, "batch length hidden"]
    rope: Rope
    kv: KeyValue | None


def over_layers[T](
    model: Hymba,
    tokens: Int[Array, "batch length"],
    function: Callable[..., T],
    *arguments: Any,
) -> Iterator[T]:
    """`function(mixer, inputs, *arguments)` of each layer, first layer first.

    The values of one layer exist at a time, and the hidden states of its group. Equal layers share
    a compiled program.

    Args:
      model: its adapters take part, and its layers may be stacked.
      function: of a module, which is hashed by its identity; it is traced.
      arguments: arrays.
    """
    model = unstack_layers(model)
    positions = jnp.arange(model.config.num_meta_tokens + tokens.shape[1])[None]
    rope = make_rope(model.config, positions, positions.shape[1])
    kv = None
    # The last hidden state is no layer's input.
    for block, x in zip(model.blocks(), model.hidden_states(tokens), strict=False):
        graph, params = nnx.split(block)
        result, kv = _of_layer(function, graph, params, x, rope, kv, *arguments)
        yield result


def valid_lengths(
    model: Hymba, tokens: Int[Array, "batch length"], lengths: Int[Array, " batch"] | None
) -> Int[Array, " batch"]:
    """Valid tokens of each row: `lengths`, or all of them if it is None.

    Raises:
      ValueError: rows are padded, and the rotation depends on their lengths.
    """
    if lengths is None:
        return jnp.full(len(tokens), tokens.shape[1])
    total = model.config.num_meta_tokens + tokens.shape[1]
    if total > model.config.max_fixed_positions and (lengths < tokens.shape[1]).any():
        raise ValueError(
            f"lengths: with dynamic_ntk the rotation of {total} positions depends on the length of "
            "each row: give rows without padding"
        )
    return lengths


@partial(jax.jit, static_argnums=(0, 1))
def _of_layer(
    function: Callable[..., Any],
    graph: nnx.GraphDef[Block],
    params: nnx.State,
    x: Float[Array, "batch length hidden"],
    rope: Rope,
    kv: KeyValue | None,
    *arguments: Any,
) -> tuple[Any, KeyValue | None]:
    block = nnx.merge(graph, params)
    x = block.mixer_norm(x)
    attention = attention_heads(block.mixer)
    if attention is None:
        kv = None
    elif not attention.reuses_kv:
        kv = attention.key_value(x, rope)
    return function(block.mixer, LayerInputs(x, rope, kv), *arguments), kv


def attention_heads(mixer: nnx.Module) -> Attention | None:
    """Those of a layer, if it has some."""
    heads: Attention | None = getattr(mixer, "attention", None)
    return heads
