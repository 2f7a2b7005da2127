"""Where attention goes: to meta tokens, the first token, the token itself, or others (Fig. 7)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hymba_jax.analysis.layer_inputs import LayerInputs, attention_heads, over_layers, valid_lengths
from hymba_jax.model import Hymba
from hymba_jax.ops.attention.reference import attention_mask, attention_weights
from hymba_jax.types import Array, Float, Int

KINDS = ("meta", "bos", "self", "cross")
"""Of keys: the meta tokens; the first token; the query's own; all others. The first token's
attention to itself is "bos"."""

_QUERIES = 128  # whose weights are in memory at once


class AttentionMass(NamedTuple):
    """The mean over all queries, by layer and head; NaN in layers without attention heads.

    Attributes:
      mass: weights by `KINDS` of keys, which sum to 1.
      entropy: of the weights, in nats.
    """

    mass: Float[np.ndarray, "layers heads kinds"]
    entropy: Float[np.ndarray, "layers heads"]


def attention_mass(
    model: Hymba,
    tokens: Int[Array, "batch length"],
    lengths: Int[Array, " batch"] | None = None,
) -> AttentionMass:
    """The attention mass and its entropy; queries are tokens, never meta tokens.

    Args:
      lengths: valid tokens of each row; the rest is padding, and no query.

    Raises:
      ValueError: rows are padded, and the rotation depends on their lengths.
    """
    lengths = valid_lengths(model, tokens, lengths)
    heads = model.config.attention.num_heads
    nothing = np.full((heads, len(KINDS) + 1), np.nan)
    sums = [
        nothing if each is None else np.asarray(each, np.float64) / np.asarray(lengths).sum()
        for each in over_layers(model, tokens, _sums, lengths)
    ]
    means = np.stack(sums)
    return AttentionMass(means[..., :-1], means[..., -1])


def _sums(
    mixer: nnx.Module, inputs: LayerInputs, lengths: Int[Array, " batch"]
) -> Float[Array, "heads parts"] | None:
    """Mass by kind, and entropy, summed over all valid queries; some queries at a time."""
    attention = attention_heads(mixer)
    if attention is None or inputs.kv is None:
        return None
    first, key = attention.num_meta_tokens, inputs.kv.key
    query = attention.query(inputs.x, inputs.rope)[:, first:]
    keys = jnp.arange(key.shape[1])

    def of_queries(start: Int[Array, ""]) -> Float[Array, "heads parts"]:
        at = start + jnp.arange(_QUERIES)  # beyond the last one is padding, which is not valid
        mask = attention_mask(
            first + at[None], keys, window=attention.window, num_meta_tokens=first
        )
        some = jnp.take(query, at, axis=1, mode="clip")
        weights = attention_weights(some, key, mask)
        weights = weights.reshape(len(query), -1, *weights.shape[3:])
        to_meta, to_bos = weights[..., :first].sum(-1), weights[..., first]
        own_key = (first + at)[None, None, :, None]
        own = jnp.take_along_axis(weights, own_key, -1, mode="clip")[..., 0]
        own = jnp.where(at == 0, 0.0, own)
        entropy = -jax.scipy.special.xlogy(weights, weights).sum(-1)
        parts = jnp.stack([to_meta, to_bos, own, 1 - to_meta - to_bos - own, entropy], -1)
        valid = at[None] < jnp.expand_dims(lengths, 1)
        return jnp.where(valid[:, None, :, None], parts, 0.0).sum((0, 2))

    starts = jnp.arange(0, query.shape[1], _QUERIES)
    return jax.lax.map(of_queries, starts).sum(0)
