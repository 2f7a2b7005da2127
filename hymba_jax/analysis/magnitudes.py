"""Outputs of the attention and the SSM heads before and after their norms (Fig. 12)."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx

from hymba_jax.analysis.layer_inputs import LayerInputs, over_layers, valid_lengths
from hymba_jax.model import Hymba, unstack_layers
from hymba_jax.model.context import Context
from hymba_jax.model.kv_cache import AttendedKV, KeyValue, KVCache
from hymba_jax.model.mixer import HybridMixer
from hymba_jax.types import Array, Float, Int

SIDES = ("attention", "ssm")
"""The two kinds of heads."""


class Magnitudes(NamedTuple):
    """Mean absolute values by layer and `SIDES`; NaN in layers that do not have both.

    Attributes:
      before, after: the norm, whose scale is the side's beta vector.
    """

    before: Float[np.ndarray, "layers sides"]
    after: Float[np.ndarray, "layers sides"]


def output_magnitudes(
    model: Hymba,
    tokens: Int[Array, "batch length"],
    lengths: Int[Array, " batch"] | None = None,
) -> Magnitudes:
    """The mean over all tokens, meta tokens left out, and channels.

    Args:
      lengths: valid tokens of each row; the rest is padding.

    Raises:
      ValueError: rows are padded, and the rotation depends on their lengths.
    """
    lengths = valid_lengths(model, tokens, lengths)
    count = float(np.asarray(lengths).sum())
    means = np.stack(
        [
            np.full((2, len(SIDES)), np.nan) if each is None else np.asarray(each) / count
            for each in over_layers(model, tokens, _sums, lengths)
        ]
    )
    return Magnitudes(means[:, 0], means[:, 1])


def beta_vectors(model: Hymba) -> list[Float[np.ndarray, "sides channels"] | None]:
    """The scales of the two norms of each layer; None of a layer that does not have both."""
    return [
        np.stack([np.asarray(norm.scale[...]) for norm in (mixer.attention_norm, mixer.ssm_norm)])
        if isinstance(mixer, HybridMixer)
        else None
        for mixer in (block.mixer for block in unstack_layers(model).blocks())
    ]


def _sums(
    mixer: nnx.Module, inputs: LayerInputs, lengths: Int[Array, " batch"]
) -> Float[Array, "norms sides"] | None:
    """Mean absolute values over channels, summed over valid tokens."""
    if not isinstance(mixer, HybridMixer) or inputs.kv is None:
        return None
    attention, first = mixer.attention, mixer.attention.num_meta_tokens
    context = Context(inputs.rope)
    meta = KVCache.of(KeyValue(*(array[:1, :first] for array in inputs.kv)))
    tokens = KeyValue(*(array[:, first:] for array in inputs.kv))
    query = attention.query(inputs.x, inputs.rope)[:, first:]
    attended = attention.attend(query, AttendedKV(tokens, None, meta), context)
    ssm, _ = mixer.ssm(inputs.x, context, None)
    outputs = attended.reshape(*query.shape[:2], -1), ssm[:, first:]
    normed = mixer.attention_norm(outputs[0]), mixer.ssm_norm(outputs[1])
    valid = jnp.arange(query.shape[1])[None] < jnp.expand_dims(lengths, 1)

    def total(y: Float[Array, "batch length channels"]) -> Float[Array, ""]:
        return jnp.where(valid, jnp.abs(y.astype(jnp.float32)).mean(-1), 0.0).sum()

    return jnp.stack([jnp.stack([total(y) for y in pair]) for pair in (outputs, normed)])
