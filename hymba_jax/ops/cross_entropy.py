"""Cross entropy from hidden states and the output projection, without the logits of a whole batch.

Logits are computed in float32, a chunk of positions at a time. Where a gradient is wanted, that of
a chunk is computed in the forward pass, while its logits are there, so that no matmul is done twice
(as in Liger Kernel, arXiv 2410.10989); the backward pass only scales it by the gradient of the sum.
Losses that are not a sum over positions need `token_nats`, whose backward pass computes the logits
again, as their gradient depends on all of the forward pass.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from hymba_jax.ops.precision import einsum
from hymba_jax.parallel.shard_map import Axes, mesh_axes, shard_map
from hymba_jax.types import Array, Bool, Float, Int

# Positions of a chunk, on each device. A chunk reads and writes the kernel's float32 gradient, 8
# bytes an entry, for 6 FLOPs an entry and position: 1536 FLOPs per byte. Chips with less than that
# (v5e has 240, H100 300, v6e 560) are bound by the matmuls; more would only take memory.
CHUNK = 2048


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
    dx, dkernel = (
        (part.astype(jnp.float32) * cotangents[0]).astype(part.dtype) for part in gradient
    )
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


class _Shards(NamedTuple):
    """The mesh axes that each device has a shard along."""

    positions: tuple[str, ...]
    vocab: tuple[str, ...]
    hidden: tuple[str, ...]  # of the kernel as it is stored


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
    """Loss and nats, and the gradients of x and kernel if wanted; each device on its shards.

    Args:
      weights: of each position in the loss; those of weight 0 are not valid.
    """
    sizes = dict(zip(axes, kernel.shape, strict=True))
    batch, length = mesh_axes("batch", x.shape[0]), mesh_axes("length", x.shape[1])
    hidden = mesh_axes("hidden", sizes["hidden"])
    if not {*hidden} <= {*batch, *length}:  # its gradient is not summed along them: no scattering
        hidden = ()
    shards = _Shards(batch + length, mesh_axes("vocab", sizes["vocab"]), hidden)
    rows: Axes = ("batch", "length")
    stored: Axes = tuple(axis if axis == "vocab" or hidden else None for axis in axes)
    function = partial(_of_shard, axes, shards, z_loss, with_gradient)
    in_axes = {"x": (*rows, None), "kernel": stored, "targets": rows, "weights": rows}
    gradient_axes = ((*rows, None), stored) if with_gradient else ()
    out_axes = ((), rows, *gradient_axes)
    result: tuple[Array, ...] = shard_map(
        function, in_axes, out_axes, x=x, kernel=kernel, targets=targets, weights=weights
    )
    return result


def _of_shard(
    axes: tuple[str, str],
    shards: _Shards,
    z_loss: float,
    with_gradient: bool,
    x: Array,
    kernel: Array,
    targets: Array,
    weights: Array,
) -> tuple[Array, ...]:
    """What `_sharded` returns, of this device's shards."""
    stored_dtype, kernel = kernel.dtype, kernel.astype(x.dtype)
    at = axes.index("hidden")
    if shards.hidden:
        kernel = lax.all_gather(kernel, shards.hidden, axis=at, tiled=True)
    letters = "".join(axis[0] for axis in axes)  # hv or vh

    def add_chunk(dkernel: Array | None, chunk: tuple[Array, ...]) -> tuple[Any, Any]:
        x, targets, weights = chunk
        logits = einsum(f"ph,{letters}->pv", x, kernel, preferred_element_type=jnp.float32)
        loss, nats, dlogits = _of_logits(logits, targets, weights, shards.vocab, z_loss)
        if dkernel is None:
            return None, (loss, nats)
        dlogits = dlogits.astype(x.dtype)
        dx = einsum(f"pv,{letters}->ph", dlogits, kernel)
        dkernel += einsum(f"ph,pv->{letters}", x, dlogits, preferred_element_type=jnp.float32)
        return dkernel, (loss, nats, dx)

    dkernel = jnp.zeros(kernel.shape, jnp.float32) if with_gradient else None
    chunks = tuple(_in_chunks(array) for array in (x, targets, weights))
    dkernel, (loss, nats, *dx) = lax.scan(add_chunk, dkernel, chunks)
    result = _sum(loss.sum(), shards.positions), _in_rows(nats, weights.shape)
    if dkernel is None:
        return result
    if shards.hidden:
        dkernel = lax.psum_scatter(dkernel, shards.hidden, scatter_dimension=at, tiled=True)
    dkernel = _sum(dkernel, tuple(name for name in shards.positions if name not in shards.hidden))
    dx = _sum(_in_rows(dx[0], weights.shape), shards.vocab)
    return *result, dx, dkernel.astype(stored_dtype)


def _of_logits(
    logits: Float[Array, "positions vocab"],
    targets: Int[Array, "positions"],
    weights: Float[Array, "positions"],
    vocab: tuple[str, ...],
    z_loss: float,
) -> tuple[Array, Array, Array]:
    """The sum of the loss, the nats, and the loss's gradient, from this device's logits.

    Args:
      vocab: the mesh axes that they are sharded over.
    """
    first = logits.shape[1] * lax.axis_index(vocab) if vocab else 0
    is_target = (first + jnp.arange(logits.shape[1]))[None] == targets[:, None]
    largest = logits.max(1)
    if vocab:
        largest = lax.pmax(largest, vocab)
    exp = jnp.exp(logits - largest[:, None])
    of_target = jnp.where(is_target, logits, 0.0)
    z, target = _sum((exp.sum(1), of_target.sum(1)), vocab)
    log_z = largest + jnp.log(z)
    valid = weights != 0
    nats = jnp.where(valid, log_z - target, 0.0)
    loss = weights * (nats + z_loss * jnp.where(valid, jnp.square(log_z), 0.0))
    per_probability = (1 + 2 * z_loss * log_z) / z
    gradient = weights[:, None] * (exp * per_probability[:, None] - is_target)
    return loss.sum(), nats, jnp.where(valid[:, None], gradient, 0.0)


def _in_chunks(array: Array) -> Array:
    """(batch, length, ...) as (chunks, positions of a chunk, ...); padded with zeros."""
    count = math.prod(array.shape[:2])
    num_chunks = -(-count // CHUNK)
    steps = -(-count // num_chunks)
    flat = array.reshape(count, *array.shape[2:])
    flat = jnp.pad(flat, [(0, num_chunks * steps - count)] + [(0, 0)] * (flat.ndim - 1))
    return flat.reshape(num_chunks, steps, *flat.shape[1:])


def _in_rows(chunks: Array, rows: tuple[int, ...]) -> Array:
    """(chunks, positions of a chunk, ...) as (batch, length, ...), without the padding."""
    rest = chunks.shape[2:]
    return chunks.reshape(-1, *rest)[: math.prod(rows)].reshape(*rows, *rest)


def _sum[T](values: T, mesh_axes: tuple[str, ...]) -> T:
    """Over the devices along these mesh axes."""
    return lax.psum(values, mesh_axes) if mesh_axes else values
