"""Distillation from a teacher's logits (arXiv 1503.02531), without those of a whole batch.

    (1 - weight) cross entropy + weight T^2 KL(p || q),   p, q = softmax of the logits / T

p is the teacher's distribution and q the student's; T^2 makes the gradients of both terms of one
size at any temperature. As in `cross_entropy.py`, the gradient is computed in the forward pass.
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


class Distillation(NamedTuple):
    """The loss of a batch.

    Attributes:
      loss: sum over the valid positions.
      nats: cross entropy of each position; 0 where it is not valid. Has no gradient.
      divergence: the same of KL(p || q), in nats.
    """

    loss: Float[Array, ""]
    nats: Float[Array, "batch length"]
    divergence: Float[Array, "batch length"]


class _Static(NamedTuple):
    """What is no array."""

    axes: tuple[str, str]
    teacher_axes: tuple[str, str]
    temperature: float
    weight: float


def distillation(
    student: Projection,
    teacher: Projection,
    targets: Int[Array, "batch length"],
    valid: Bool[Array, "batch length"],
    *,
    temperature: float,
    weight: float,
) -> Distillation:
    """The distillation of a teacher, which has no gradient, summed over the valid positions.

    The mesh in context may shard the batch, the length and the kernels.

    Args:
      student, teacher: over the same vocabulary, padding included.
      targets: the right token; any number where it is not valid.
      valid: which positions are summed.
      temperature: T.
      weight: of the divergence; that of the cross entropy is the rest.
    """
    static = _Static(student.axes, teacher.axes, temperature, weight)
    operands = student.x, student.kernel, teacher.x, teacher.kernel, targets, valid
    return Distillation(*_distillation(static, *operands))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _distillation(static: _Static, *operands: Array) -> tuple[Array, ...]:
    return _computed(static, *operands, with_gradient=False)


def _forward(static: _Static, *operands: Array) -> tuple[tuple[Array, ...], tuple[Array, Array]]:
    *result, dx, dkernel = _computed(static, *operands, with_gradient=True)
    return tuple(result), (dx, dkernel)


def _backward(
    _: _Static, gradient: tuple[Array, Array], cotangents: tuple[Array, ...]
) -> tuple[Array | None, ...]:
    dx, dkernel = scale_gradient(gradient, cotangents[0])
    return dx, dkernel, None, None, None, None


_distillation.defvjp(_forward, _backward)


def _computed(
    static: _Static,
    x: Array,
    kernel: Array,
    teacher_x: Array,
    teacher_kernel: Array,
    targets: Array,
    valid: Array,
    *,
    with_gradient: bool,
) -> tuple[Array, ...]:
    """Loss, nats and divergence, and the gradients of x and kernel if wanted."""
    return sum_over_chunks(
        partial(_of_logits, static.temperature, static.weight),
        Projection(x, kernel, static.axes),
        {"targets": targets, "valid": valid},
        num_values=2,
        with_gradient=with_gradient,
        fixed=Projection(teacher_x, teacher_kernel, static.teacher_axes),
    )


def _of_logits(
    temperature: float,
    weight: float,
    logits: Float[Array, "positions vocab"],
    chunk: Chunk,
    vocab: tuple[str, ...],
) -> OfChunk:
    """The loss, with the nats and the divergence as its values."""
    valid, given = chunk["valid"], chunk["fixed_logits"]
    is_target = targets_of_shard(chunk["targets"], logits.shape[1], vocab)
    probabilities, log_z = _softmax(logits, vocab)
    soft, soft_log_z = _softmax(logits / temperature, vocab)
    wanted, wanted_log_z = _softmax(given / temperature, vocab)
    difference = wanted * (given - logits) / temperature
    of_target = jnp.where(is_target, logits, 0.0)
    target, expected = sum_over((of_target.sum(1), difference.sum(1)), vocab)
    nats = jnp.where(valid, log_z - target, 0.0)
    divergence = jnp.where(valid, expected - wanted_log_z + soft_log_z, 0.0)
    loss = (1 - weight) * nats + weight * temperature**2 * divergence
    gradient = (1 - weight) * (probabilities - is_target)
    gradient += weight * temperature * (soft - wanted)
    return OfChunk(loss.sum(), (nats, divergence), jnp.where(valid[:, None], gradient, 0.0))


def _softmax(logits: Array, vocab: tuple[str, ...]) -> tuple[Array, Array]:
    """The probabilities, and the logarithm of what they are divided by."""
    largest = largest_of(logits, vocab)
    exp = jnp.exp(logits - largest[:, None])
    z = sum_over(exp.sum(1), vocab)
    return exp / z[:, None], largest + jnp.log(z)
