"""Next-token cross entropy."""

from typing import NamedTuple

import jax.numpy as jnp
import optax

from hymba_jax.data.packing import IGNORED_TARGET
from hymba_jax.types import Array, Float, Int


class LossSum(NamedTuple):
    """Cross entropy of several tokens; sums of batches are sums of these.

    Attributes:
      nats: summed over the tokens that count.
      tokens: how many they are.
    """

    nats: Float[Array, ""]
    tokens: Int[Array, ""]


def next_token_loss(
    logits: Float[Array, "batch length vocab"], targets: Int[Array, "batch length"]
) -> LossSum:
    """Cross entropy in float32; positions whose target is IGNORED_TARGET do not count."""
    counts = targets != IGNORED_TARGET
    nats = optax.losses.softmax_cross_entropy_with_integer_labels(
        logits.astype(jnp.float32), jnp.where(counts, targets, 0)
    )
    return LossSum(jnp.where(counts, nats, 0.0).sum(), counts.sum())
