"""The SSD recurrence as matmuls (section 6 of arXiv 2405.21060), in plain XLA.

In a chunk, position i reads position j <= i with weight (C_i B_j) exp(sum of delta A over j+1..i),
which makes two matmuls of all its positions; the state passes from chunk to chunk. The gradient
keeps only the states between chunks, and computes the rest again.

Decays are differences of sums that start anew in each chunk and each document, so that no digits
are lost to what came before, and a document is exactly what it is alone.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from hymba_jax.ops.documents import Documents
from hymba_jax.ops.precision import einsum
from hymba_jax.types import Array, Bool, Float

_CHUNK = 64


def ssd_chunked(
    x: Float[Array, "batch length ssm_heads ssm_head_dim"],
    dt: Float[Array, "batch length ssm_heads"],
    A: Float[Array, "ssm_heads"],
    B: Float[Array, "batch length ssm_groups state"],
    C: Float[Array, "batch length ssm_groups state"],
    D: Float[Array, "ssm_heads"] | None = None,
    dt_bias: Float[Array, "ssm_heads"] | None = None,
    initial_state: Float[Array, "batch ssm_heads ssm_head_dim state"] | None = None,
    documents: Documents | None = None,
) -> tuple[
    Float[Array, "batch length ssm_heads ssm_head_dim"],
    Float[Array, "batch ssm_heads ssm_head_dim state"],
]:
    """`ssd` by matmuls in each chunk."""
    batch, length, heads, head_dim = x.shape
    groups, state = B.shape[2:]
    by_group = (groups, heads // groups)  # head h reads group h // (heads / groups)
    inputs, dt, A, B, C = (v.astype(jnp.float32) for v in (x, dt, A, B, C))
    if dt_bias is not None:
        dt = dt + dt_bias.astype(jnp.float32)[None, None]
    steps = min(length, _CHUNK)
    chunks = math.ceil(length / steps)

    def split(v: Array, *axes: int) -> Array:
        """(batch, length, ...) as (chunks, batch, ..., steps, last), in the order of matmuls."""
        padding = [(0, chunks * steps - length) if axis == 1 else (0, 0) for axis in range(v.ndim)]
        v = jnp.pad(v, padding).reshape(batch, chunks, steps, *axes)
        return jnp.moveaxis(jnp.moveaxis(v, 1, 0), 2, -2)

    def grouped(state: Array) -> Array:
        return state.astype(jnp.float32).reshape(batch, *by_group, head_dim, -1)

    if initial_state is None:
        initial_state = jnp.zeros((batch, heads, head_dim, state), jnp.float32)
    starts = None if documents is None else split(documents.starts[..., None], 1)[..., 0]
    document_state = None if documents is None else grouped(documents.state)
    # A time step of zero leaves the state unchanged, as padding must.
    delta = jax.nn.softplus(dt)

    @jax.checkpoint
    def chunk(h: Array, at: tuple[Any, ...]) -> tuple[Array, Array]:
        x, delta, B, C, starts = at
        return _chunk(h, x, delta, A.reshape(by_group), B, C, starts, document_state)

    over = (
        split(inputs, *by_group, head_dim),
        split(delta[..., None], *by_group, 1)[..., 0],
        split(B, groups, state),
        split(C, groups, state),
        starts,
    )
    final_state, y = lax.scan(chunk, grouped(initial_state), over)
    y = jnp.moveaxis(jnp.moveaxis(y, -2, 2), 0, 1)
    y = y.reshape(batch, chunks * steps, heads, head_dim)[:, :length]
    if D is not None:
        y = y + D.astype(jnp.float32)[None, None, :, None] * inputs
    return y.astype(x.dtype), final_state.reshape(batch, heads, head_dim, state)


def _chunk(
    h: Float[Array, "batch ssm_groups heads_of_group ssm_head_dim state"],
    x: Float[Array, "batch ssm_groups heads_of_group steps ssm_head_dim"],
    delta: Float[Array, "batch ssm_groups heads_of_group steps"],
    A: Float[Array, "ssm_groups heads_of_group"],
    B: Float[Array, "batch ssm_groups steps state"],
    C: Float[Array, "batch ssm_groups steps state"],
    starts: Bool[Array, "batch steps"] | None,
    document_state: Float[Array, "batch ssm_groups heads_of_group ssm_head_dim state"] | None,
) -> tuple[Array, Array]:
    """The state after a chunk, and its y without D, from the state before it."""
    steps = x.shape[-2]
    # Whether position i reads position j.
    reads = jnp.broadcast_to(jnp.tri(steps, dtype=bool)[None], (len(x), steps, steps))
    if starts is not None:
        document = jnp.cumsum(starts, axis=1)  # 0 is that of the chunk before
        reads = reads & (document[:, :, None] == document[:, None])
    # Sums of delta A over the positions of the document in this chunk, up to each position.
    total = einsum("bgrj,bij->bgri", delta * A[None, ..., None], reads.astype(x.dtype))
    between = total[..., :, None] - total[..., None, :]
    decay = jnp.exp(jnp.where(reads[:, None, None], between, -jnp.inf))
    u = delta[..., None] * x

    scores = einsum("bgin,bgjn->bgij", C, B)
    y = einsum("bgrij,bgrjp->bgrip", scores[:, :, None] * decay, u)
    from_before = einsum("bgin,bgrpn->bgrip", C, h)
    kept = h
    if starts is not None and document_state is not None:
        is_new = document > 0
        of_document = einsum("bgin,bgrpn->bgrip", C, document_state)
        from_before = jnp.where(is_new[:, None, None, :, None], of_document, from_before)
        kept = jnp.where(is_new[:, -1, None, None, None, None], document_state, h)
    y = y + jnp.exp(total)[..., None] * from_before

    added = einsum("bgrjp,bgjn->bgrpn", decay[..., -1, :, None] * u, B)
    return jnp.exp(total[..., -1, None, None]) * kept + added, y
