"""Rotary position embeddings (arXiv 2104.09864), in float32 whatever the model computes in."""

import math
from typing import NamedTuple

import jax.numpy as jnp

from hymba_jax.config import HymbaConfig
from hymba_jax.types import Array, Float, Int


class Rope(NamedTuple):
    """Cosine and sine of each position's angles, meta tokens counted as positions."""

    cos: Float[Array, "batch_or_1 length half_dim"]
    sin: Float[Array, "batch_or_1 length half_dim"]

    def rotate(
        self, x: Float[Array, "batch length heads head_dim"]
    ) -> Float[Array, "batch length heads head_dim"]:
        """Rotates pairs (i, i + head_dim / 2) of each head by its position's angles."""
        first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
        cos, sin = self.cos[:, :, None], self.sin[:, :, None]
        rotated = (first * cos - second * sin, second * cos + first * sin)
        return jnp.concatenate(rotated, axis=-1).astype(x.dtype)


def max_fixed_positions(config: HymbaConfig) -> int | float:
    """Positions, meta tokens included, up to which rotation does not depend on the length."""
    if config.rope_type != "dynamic_ntk":
        return math.inf
    return config.attention.rope_original_positions


def make_rope(
    config: HymbaConfig, positions: Int[Array, "batch_or_1 length"], total: int | Int[Array, ""]
) -> Rope:
    """The rotation for these positions of a sequence.

    Args:
      positions: absolute, counted from the first meta token; one row if all rows are equal.
      total: length of the whole sequence, meta tokens included; only "dynamic_ntk" reads it.
    """
    frequencies = inverse_frequencies(config, total)
    angles = positions.astype(jnp.float32)[:, :, None] * frequencies[None, None]
    return Rope(jnp.cos(angles), jnp.sin(angles))


def inverse_frequencies(
    config: HymbaConfig, total: int | Int[Array, ""]
) -> Float[Array, " half_dim"]:
    """Radians by which a position rotates each pair of channels.

    The ntk forms enlarge the base so that at `max_positions` (or the current length) the slowest
    pair has rotated no further than at `rope_original_positions` before.
    """
    base: float | Array = config.rope_base
    if config.rope_type == "dynamic_ntk":
        factor = jnp.maximum(2 * total / config.attention.rope_original_positions - 1, 1.0)
        base = base * factor**config.ntk_exponent
    return base ** (-jnp.arange(0, config.head_dim, 2, dtype=jnp.float32) / config.head_dim)
