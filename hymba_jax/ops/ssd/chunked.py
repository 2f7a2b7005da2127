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
        """(batch, length, ...) as (chunks, batch, steps, ...)."""
        padding = [(0, chunks * steps - length) if axis == 1 else (0, 0) for axis in range(v.ndim)]
        return jnp.moveaxis(jnp.pad(v, padding).reshape(batch, chunks, steps, *axes), 1, 0)

    def state_first(state: Array) -> Array:
        """(batch, heads, channels, state) as (batch, groups, state, heads, channels)."""
        state = state.astype(jnp.float32).reshape(batch, *by_group, head_dim, -1)
        return jnp.moveaxis(state, -1, 2)

    if initial_state is None:
        initial_state = jnp.zeros((batch, heads, head_dim, state), jnp.float32)
    starts = None if documents is None else split(documents.starts)
    document_state = None if documents is None else state_first(documents.state)

    @jax.checkpoint
    def chunk(h: Array, at: tuple[Any, ...]) -> tuple[Array, Array]:
        x, delta, B, C, starts = at
        return _chunk(h, x, delta, A.reshape(by_group), B, C, starts, document_state)

    over = (
        split(inputs, *by_group, head_dim),
        split(jax.nn.softplus(dt), *by_group),  # padded with zero, which leaves the state unchanged
        split(B, groups, state),
        split(C, groups, state),
        starts,
    )
    final_state, y = lax.scan(chunk, state_first(initial_state), over)
    y = jnp.moveaxis(y, 0, 1).reshape(batch, chunks * steps, heads, head_dim)[:, :length]
    if D is not None:
        y = y + D.astype(jnp.float32)[None, None, :, None] * inputs
    final_state = jnp.moveaxis(final_state, 2, -1).reshape(batch, heads, head_dim, state)
    return y.astype(x.dtype), final_state


def _chunk(
    h: Float[Array, "batch ssm_groups state heads_of_group ssm_head_dim"],
    x: Float[Array, "batch steps ssm_groups heads_of_group ssm_head_dim"],
    delta: Float[Array, "batch steps ssm_groups heads_of_group"],
    A: Float[Array, "ssm_groups heads_of_group"],
    B: Float[Array, "batch steps ssm_groups state"],
    C: Float[Array, "batch steps ssm_groups state"],
    starts: Bool[Array, "batch steps"] | None,
    document_state: Float[Array, "batch ssm_groups state heads_of_group ssm_head_dim"] | None,
) -> tuple[Array, Array]:
    """The state after a chunk, and its y without D, from the state before it."""
    batch, steps = delta.shape[:2]
    # Whether position i reads position j.
    reads = jnp.broadcast_to(jnp.tri(steps, dtype=bool)[None], (batch, steps, steps))
    if starts is not None:
        document = jnp.cumsum(starts, axis=1)  # 0 is that of the chunk before
        reads = reads & (document[:, :, None] == document[:, None])
    # Sums of delta A over the positions of the document in this chunk, up to each position.
    total = einsum("bij,bjgr->bgri", reads.astype(delta.dtype), delta * A[None, None])
    between = total[..., :, None] - total[..., None, :]
    decay = jnp.exp(jnp.where(reads[:, None, None], between, -jnp.inf))
    u = delta[..., None] * x

    scores = einsum("bign,bjgn->bgij", C, B)
    y = einsum("bgrij,bjgrp->bigrp", scores[:, :, None] * decay, u)
    from_before, kept = einsum("bign,bgnrp->bigrp", C, h), h
    if starts is not None and document_state is not None:
        is_new = (document > 0)[..., None, None, None]
        of_document = einsum("bign,bgnrp->bigrp", C, document_state)
        from_before = jnp.where(is_new, of_document, from_before)
        kept = jnp.where(is_new[:, -1, None], document_state, h)
    y = y + jnp.exp(jnp.moveaxis(total, -1, 1))[..., None] * from_before

    to_end = jnp.moveaxis(decay[..., -1, :], -1, 1)[..., None]
    added = einsum("bjgn,bjgrp->bgnrp", B, to_end * u)
    return jnp.exp(total[..., -1])[:, :, None, :, None] * kept + added, y
