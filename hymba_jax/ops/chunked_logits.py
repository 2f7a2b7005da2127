"""Losses of logits, a sum over positions, without the logits of a whole batch.

Logits are computed in float32, a chunk of positions at a time. Where a gradient is wanted, that of
a chunk is computed while its logits are there, so that no matmul is done twice (as in Liger Kernel,
arXiv 2410.10989).
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from hymba_jax.ops.precision import einsum
from hymba_jax.parallel.shard_map import Axes, mesh_axes, shard_map
from hymba_jax.types import Array, Float

# Positions of a chunk, on each device. A chunk reads and writes the kernel's float32 gradient, 8
# bytes an entry, for 6 FLOPs an entry and position: 1536 FLOPs per byte. Chips with less than that
# (v5e has 240, H100 300, v6e 560) are bound by the matmuls; more would only take memory.
CHUNK = 2048


class OfChunk(NamedTuple):
    """What a loss makes of the logits of a chunk.

    Attributes:
      loss: its sum over the positions.
      values: numbers of each position, without gradients.
      gradient: of the loss, by the logits.
    """

    loss: Float[Array, ""]
    values: tuple[Float[Array, "positions"], ...]
    gradient: Float[Array, "positions vocab"]


type Chunk = Mapping[str, Array]
"""What a loss needs at the positions of a chunk beside their logits, by name."""

type Loss = Callable[[Array, Chunk, tuple[str, ...]], OfChunk]
"""Of this device's logits of a chunk, and the mesh axes that the vocabulary is sharded over."""


class Projection(NamedTuple):
    """Logits that are not computed yet.

    Attributes:
      x: hidden states.
      kernel: the output projection, which is rounded to their dtype.
      axes: the kernel's logical axes, `vocab` first for an embedding.
    """

    x: Float[Array, "batch length hidden"]
    kernel: Float[Array, "hidden vocab"] | Float[Array, "vocab hidden"]
    axes: tuple[str, str] = ("hidden", "vocab")


class _Shards(NamedTuple):
    """The mesh axes that each device has a shard along."""

    positions: tuple[str, ...]
    vocab: tuple[str, ...]
    hidden: tuple[str, ...]  # of the kernel as it is stored


def scale_gradient(
    gradient: tuple[Array, Array], cotangent: Float[Array, ""]
) -> tuple[Array, Array]:
    """The gradients of x and kernel that `sum_over_chunks` found, by that of a function of the sum.

    Multiplied in float32; each keeps its dtype.
    """
    dx, dkernel = ((part.astype(jnp.float32) * cotangent).astype(part.dtype) for part in gradient)
    return dx, dkernel


@jax.named_scope("logits")
def sum_over_chunks(
    loss: Loss,
    logits: Projection,
    rows: Mapping[str, Array],
    num_values: int,
    *,
    with_gradient: bool,
    fixed: Projection | None = None,
) -> tuple[Array, ...]:
    """A loss, its values of each position, and its gradients by x and kernel if wanted.

    Each device computes them of its shards: the mesh in context may shard the batch, the length and
    the kernel, whose gradient is summed over chunks and devices in float32.

    Args:
      loss: of a chunk.
      rows: (batch, length), what it takes of each position.
      num_values: that it returns of each.
      fixed: other logits over the same vocabulary, which a chunk has as `fixed_logits`; they have
        no gradient.
    """
    x, kernel, axes = logits
    sizes = dict(zip(axes, kernel.shape, strict=True))
    batch, length = mesh_axes("batch", x.shape[0]), mesh_axes("length", x.shape[1])
    hidden = mesh_axes("hidden", sizes["hidden"])
    if not {*hidden} <= {*batch, *length}:  # its gradient is not summed along them: no scattering
        hidden = ()
    shards = _Shards(batch + length, mesh_axes("vocab", sizes["vocab"]), hidden)
    positions: Axes = ("batch", "length")
    stored: Axes = tuple(axis if axis == "vocab" or hidden else None for axis in axes)
    arrays = {"x": x, "kernel": kernel, **rows}
    in_axes = dict.fromkeys(rows, positions) | {"x": (*positions, None), "kernel": stored}
    if fixed is not None:  # its kernel is gathered along hidden, whose size is its own
        arrays |= {"fixed_x": fixed.x, "fixed_kernel": fixed.kernel}
        in_axes["fixed_x"] = (*positions, None)
        in_axes["fixed_kernel"] = tuple(axis if axis == "vocab" else None for axis in fixed.axes)
    function = partial(_of_shard, loss, axes, fixed and fixed.axes, shards, with_gradient)
    gradient_axes = ((*positions, None), stored) if with_gradient else ()
    out_axes = ((), *[positions] * num_values, *gradient_axes)
    result: tuple[Array, ...] = shard_map(function, in_axes, out_axes, **arrays)
    return result


def _of_shard(
    loss: Loss,
    axes: tuple[str, str],
    fixed_axes: tuple[str, str] | None,
    shards: _Shards,
    with_gradient: bool,
    x: Array,
    kernel: Array,
    fixed_kernel: Array | None = None,
    **rows: Array,
) -> tuple[Array, ...]:
    """What `sum_over_chunks` returns, of this device's shards."""
    stored_dtype, kernel = kernel.dtype, kernel.astype(x.dtype)
    at, shape = axes.index("hidden"), x.shape[:2]
    if shards.hidden:
        kernel = lax.all_gather(kernel, shards.hidden, axis=at, tiled=True)

    def add_chunk(dkernel: Array | None, chunk: dict[str, Array]) -> tuple[Any, Any]:
        if fixed_kernel is not None and fixed_axes is not None:
            given = chunk.pop("fixed_x")
            fixed = fixed_kernel.astype(given.dtype)
            chunk["fixed_logits"] = _logits(given, fixed, fixed_axes)
        x = chunk.pop("x")
        of_chunk = loss(_logits(x, kernel, axes), chunk, shards.vocab)
        if dkernel is None:
            return None, (of_chunk.loss, of_chunk.values)
        dlogits = of_chunk.gradient.astype(x.dtype)
        dx = einsum(f"pv,{_letters(axes)}->ph", dlogits, kernel)
        dkernel += einsum(
            f"ph,pv->{_letters(axes)}", x, dlogits, preferred_element_type=jnp.float32
        )
        return dkernel, (of_chunk.loss, of_chunk.values, dx)

    dkernel = jnp.zeros(kernel.shape, jnp.float32) if with_gradient else None
    chunks = {name: _in_chunks(array) for name, array in {"x": x, **rows}.items()}
    dkernel, (losses, values, *dx) = lax.scan(add_chunk, dkernel, chunks)
    total = sum_over(losses.sum(), shards.positions)
    result = total, *(_in_rows(each, shape) for each in values)
    if dkernel is None:
        return result
    if shards.hidden:
        dkernel = lax.psum_scatter(dkernel, shards.hidden, scatter_dimension=at, tiled=True)
    others = tuple(name for name in shards.positions if name not in shards.hidden)
    dkernel = sum_over(dkernel, others)
    dx = sum_over(_in_rows(dx[0], shape), shards.vocab)
    return *result, dx, dkernel.astype(stored_dtype)


def _letters(axes: tuple[str, str]) -> str:
    return "".join(axis[0] for axis in axes)  # hv or vh


def _logits(x: Array, kernel: Array, axes: tuple[str, str]) -> Array:
    return einsum(f"ph,{_letters(axes)}->pv", x, kernel, preferred_element_type=jnp.float32)


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


def targets_of_shard(targets: Array, size: int, vocab: tuple[str, ...]) -> Array:
    """Which of the `size` entries of the vocabulary that this device has are targets."""
    first = size * lax.axis_index(vocab) if vocab else 0
    return (first + jnp.arange(size))[None] == targets[:, None]


def largest_of(logits: Array, vocab: tuple[str, ...]) -> Array:
    """The largest logit of each position."""
    largest = logits.max(1)
    return lax.pmax(largest, vocab) if vocab else largest


def sum_over[T](values: T, mesh_axes: tuple[str, ...]) -> T:
    """Over the devices along these mesh axes."""
    return lax.psum(values, mesh_axes) if mesh_axes else values
