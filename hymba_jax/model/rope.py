"""Rotary position embeddings (arXiv 2104.09864), in float32 whatever the model computes in."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from hymba_jax.config import HymbaConfig
from hymba_jax.ops.remat import ACTIVATION, named
from hymba_jax.types import Array, Float, Int


class Rope(NamedTuple):
    """Cosine and sine of each position's angles, meta tokens counted as positions."""

    cos: Float[Array, "batch_or_1 length half_dim"]
    sin: Float[Array, "batch_or_1 length half_dim"]

    @jax.named_scope("rope")
    def rotate(
        self, x: Float[Array, "batch length heads head_dim"]
    ) -> Float[Array, "batch length heads head_dim"]:
        """Rotates pairs (i, i + head_dim / 2) of each head by its position's angles."""
        return named(ACTIVATION, _rotate(x, self.cos, self.sin))


@jax.custom_vjp
def _rotate(
    x: Float[Array, "batch length heads head_dim"],
    cos: Float[Array, "batch_or_1 length half_dim"],
    sin: Float[Array, "batch_or_1 length half_dim"],
) -> Float[Array, "batch length heads head_dim"]:
    """Halves have an axis of their own: side by side, TPUs would pad each to 128 lanes first. Each
    is converted by itself: a conversion of both would be written to memory."""
    halves = x.reshape(*x.shape[:-1], 2, -1)
    first, second = (halves[..., i, :].astype(jnp.float32) for i in range(2))
    cos, sin = cos[:, :, None], sin[:, :, None]
    rotated = jnp.stack((first * cos - second * sin, second * cos + first * sin), axis=-2)
    return rotated.astype(x.dtype).reshape(x.shape)


def _rotate_fwd(x: Array, cos: Array, sin: Array) -> tuple[Array, tuple[Array, Array]]:
    return _rotate(x, cos, sin), (cos, sin)


def _rotate_bwd(angles: tuple[Array, Array], dy: Array) -> tuple[Array, None, None]:
    """Rotates back. Angles follow from positions, which have no gradient."""
    cos, sin = angles
    return _rotate(dy, cos, -sin), None, None


_rotate.defvjp(_rotate_fwd, _rotate_bwd)


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
    # Else XLA may compute them again in every layer.
    return Rope(*jax.lax.optimization_barrier((jnp.cos(angles), jnp.sin(angles))))


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
