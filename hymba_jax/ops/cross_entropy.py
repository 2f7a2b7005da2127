"""Cross entropy from hidden states and the output projection, without the logits of a whole batch.

Where a gradient is wanted, it is computed in the forward pass (`chunked_logits.py`); the backward
pass only scales it by the gradient of the sum.
Losses that are not a sum over positions need `token_nats`, whose backward pass computes the logits
again, as their gradient depends on all of the forward pass.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from hymba_jax.ops.chunked_logits import (
    Chunk,
    OfChunk,
    Projection,
    largest_of,
    scale_gradient,
    sum_over,
    sum_over_chunks,
    targets_of_shard,
)
from hymba_jax.types import Array, Bool, Float, Int


class CrossEntropy(NamedTuple):
    """The loss of a batch.

    Attributes:
      loss: sum over the valid positions, z-loss included.
      nats: of each position, without the z-loss; 0 where it is not valid. Has no gradient.
    """

    loss: Float[Array, ""]
    nats: Float[Array, "batch length"]


def cross_entropy(
    x: Float[Array, "batch length hidden"],
    kernel: Float[Array, "hidden vocab"] | Float[Array, "vocab hidden"],
    targets: Int[Array, "batch length"],
    valid: Bool[Array, "batch length"],
    *,
    axes: tuple[str, str] = ("hidden", "vocab"),
    z_loss: float = 0.0,
) -> CrossEntropy:
    """The cross entropy of logits = x @ kernel, summed over the valid positions:

        log Z - logits[target] + z_loss (log Z)^2,   Z = sum over the vocabulary of exp(logits)

    The mesh in context may shard the batch, the length and the kernel.

    Args:
      x: hidden states. The kernel is rounded to their dtype, and so is the gradient of the logits;
        matmuls and the softmax are summed in float32.
      kernel: the output projection. Its gradient is summed over chunks and devices in float32.
      targets: the right token; any number where it is not valid.
      valid: which positions are summed.
      axes: the kernel's logical axes, `vocab` first for an embedding.
      z_loss: weight of the second term, which keeps Z near 1 (PaLM, arXiv 2204.02311, section 5).
    """
    return CrossEntropy(*_cross_entropy(x, kernel, targets, valid, axes, z_loss))


def token_nats(
    x: Float[Array, "batch length hidden"],
    kernel: Float[Array, "hidden vocab"] | Float[Array, "vocab hidden"],
    targets: Int[Array, "batch length"],
    valid: Bool[Array, "batch length"],
    *,
    axes: tuple[str, str] = ("hidden", "vocab"),
) -> Float[Array, "batch length"]:
    """The cross entropy of each position, which has a gradient; 0 where it is not valid.

    Arguments as of `cross_entropy`.
    """
    return _token_nats(x, kernel, targets, valid, axes)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _cross_entropy(
    x: Array, kernel: Array, targets: Array, valid: Array, axes: tuple[str, str], z_loss: float
) -> tuple[Array, Array]:
    weights = valid.astype(jnp.float32)
    loss, nats = _sharded(x, kernel, targets, weights, axes, z_loss, with_gradient=False)
    return loss, nats


def _forward(
    x: Array, kernel: Array, targets: Array, valid: Array, axes: tuple[str, str], z_loss: float
) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    weights = valid.astype(jnp.float32)
    loss, nats, *gradient = _sharded(x, kernel, targets, weights, axes, z_loss, with_gradient=True)
    return (loss, nats), (gradient[0], gradient[1])


def _backward(
    _axes: tuple[str, str],
    _z_loss: float,
    gradient: tuple[Array, Array],
    cotangents: tuple[Array, Array],
) -> tuple[Array | None, ...]:
    dx, dkernel = scale_gradient(gradient, cotangents[0])
    return dx, dkernel, None, None


_cross_entropy.defvjp(_forward, _backward)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _token_nats(
    x: Array, kernel: Array, targets: Array, valid: Array, axes: tuple[str, str]
) -> Array:
    weights = valid.astype(jnp.float32)
    return _sharded(x, kernel, targets, weights, axes, 0.0, with_gradient=False)[1]


def _nats_forward(
    x: Array, kernel: Array, targets: Array, valid: Array, axes: tuple[str, str]
) -> tuple[Array, tuple[Array, ...]]:
    return _token_nats(x, kernel, targets, valid, axes), (x, kernel, targets, valid)


def _nats_backward(
    axes: tuple[str, str], operands: tuple[Array, ...], cotangents: Array
) -> tuple[Array | None, ...]:
    x, kernel, targets, valid = operands
    weights = jnp.where(valid, cotangents, 0.0)
    *_, dx, dkernel = _sharded(x, kernel, targets, weights, axes, 0.0, with_gradient=True)
    return dx, dkernel, None, None


_token_nats.defvjp(_nats_forward, _nats_backward)


def _sharded(
    x: Array,
    kernel: Array,
    targets: Array,
    weights: Array,
    axes: tuple[str, str],
    z_loss: float,
    *,
    with_gradient: bool,
) -> tuple[Array, ...]:
    """Loss and nats, and the gradients of x and kernel if wanted.

    Args:
      weights: of each position in the loss; those of weight 0 are not valid.
    """
    return sum_over_chunks(
        partial(_of_logits, z_loss),
        Projection(x, kernel, axes),
        {"targets": targets, "weights": weights},
        num_values=1,
        with_gradient=with_gradient,
    )


def _of_logits(
    z_loss: float, logits: Float[Array, "positions vocab"], chunk: Chunk, vocab: tuple[str, ...]
) -> OfChunk:
    """The loss, with the nats as its values."""
    weights = chunk["weights"]
    is_target = targets_of_shard(chunk["targets"], logits.shape[1], vocab)
    largest = largest_of(logits, vocab)
    exp = jnp.exp(logits - largest[:, None])
    of_target = jnp.where(is_target, logits, 0.0)
    z, target = sum_over((exp.sum(1), of_target.sum(1)), vocab)
    log_z = largest + jnp.log(z)
    valid = weights != 0
    nats = jnp.where(valid, log_z - target, 0.0)
    loss = weights * (nats + z_loss * jnp.where(valid, jnp.square(log_z), 0.0))
    per_probability = (1 + 2 * z_loss * log_z) / z
    gradient = weights[:, None] * (exp * per_probability[:, None] - is_target)
    return OfChunk(loss.sum(), (nats,), jnp.where(valid[:, None], gradient, 0.0))
