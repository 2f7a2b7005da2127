"""The selective scan as parallel prefixes: an associative scan in each chunk, in sequence.

A position maps the state h to decay h + input, and such maps compose associatively, so the states
of a chunk take logarithmically many rounds. The gradient keeps only the states between chunks and
recomputes those within, so that no array has a state for every position.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from hymba_jax.ops.documents import Documents
from hymba_jax.ops.remat import SCAN, named
from hymba_jax.ops.selective_scan.output import skip_and_gate
from hymba_jax.types import Array, Bool, Float

# Longer chunks exceed a CPU's cache.
_CHUNK = 32


def selective_scan_associative(
    x: Float[Array, "batch length channels"],
    dt: Float[Array, "batch length channels"],
    A: Float[Array, "state channels"],
    B: Float[Array, "batch length state"],
    C: Float[Array, "batch length state"],
    D: Float[Array, "channels"] | None = None,
    z: Float[Array, "batch length channels"] | None = None,
    dt_bias: Float[Array, "channels"] | None = None,
    initial_state: Float[Array, "batch state channels"] | None = None,
    documents: Documents | None = None,
) -> tuple[Float[Array, "batch length channels"], Float[Array, "batch state channels"]]:
    """`selective_scan` by an associative scan inside each chunk."""
    batch, length, channels = x.shape
    inputs, dt, A, B, C = (v.astype(jnp.float32) for v in (x, dt, A, B, C))
    if dt_bias is not None:
        dt = dt + dt_bias.astype(jnp.float32)[None, None]
    if initial_state is None:
        initial_state = jnp.zeros((batch, *A.shape), jnp.float32)

    steps = min(length, _CHUNK)
    chunks = math.ceil(length / steps)

    def split(v: Array, padding: float = 0) -> Array:
        pad = [(0, chunks * steps - length) if axis == 1 else (0, 0) for axis in range(v.ndim)]
        v = jnp.pad(v, pad, constant_values=padding)
        return jnp.moveaxis(v.reshape(batch, chunks, steps, *v.shape[2:]), 1, 0)

    starts = document_state = None
    if documents is not None:
        starts, document_state = split(documents.starts), documents.state.astype(jnp.float32)
    y, final_state = _scan(
        split(inputs),
        split(dt, -jnp.inf),  # softplus(-inf) = 0, so padding leaves the state unchanged
        A,
        split(B),
        split(C),
        initial_state.astype(jnp.float32),
        starts,
        document_state,
    )
    y = jnp.moveaxis(y, 0, 1).reshape(batch, chunks * steps, channels)[:, :length]
    return skip_and_gate(y, inputs, D, z).astype(x.dtype), final_state


@jax.custom_vjp
def _scan(
    x: Float[Array, "chunks batch steps channels"],
    dt: Float[Array, "chunks batch steps channels"],
    A: Float[Array, "state channels"],
    B: Float[Array, "chunks batch steps state"],
    C: Float[Array, "chunks batch steps state"],
    h: Float[Array, "batch state channels"],
    starts: Bool[Array, "chunks batch steps"] | None,
    document_state: Float[Array, "batch state channels"] | None,
) -> tuple[Float[Array, "chunks batch steps channels"], Float[Array, "batch state channels"]]:
    """The recurrence alone: y and the last state."""
    return _scan_fwd(x, dt, A, B, C, h, starts, document_state)[0]


def _scan_fwd(
    x: Array,
    dt: Array,
    A: Array,
    B: Array,
    C: Array,
    h: Array,
    starts: Array | None,
    document_state: Array | None,
) -> tuple[tuple[Array, Array], tuple[Array | None, ...]]:
    def chunk(chunk_state: Array, at: tuple[Any, ...]) -> tuple[Array, tuple[Array, Array]]:
        x, dt, B, C, starts = at
        _, _, h = _states(x, dt, A, B, chunk_state, starts, document_state)
        return h[:, -1], ((h * C[..., None]).sum(2), chunk_state)

    final_state, (y, chunk_states) = named(SCAN, lax.scan(chunk, h, (x, dt, B, C, starts)))
    return (y, final_state), (x, dt, A, B, C, chunk_states, starts, document_state)


def _scan_bwd(
    residuals: tuple[Any, ...], cotangents: tuple[Array, Array]
) -> tuple[Array | None, ...]:
    x, dt, A, B, C, chunk_states, starts, document_state = residuals
    dy, dh = cotangents

    def chunk(
        carry: tuple[Any, ...], at: tuple[Any, ...]
    ) -> tuple[tuple[Any, ...], tuple[Array, ...]]:
        after, ddocument, dA = carry
        x, dt, B, C, chunk_state, dy, starts = at
        delta, decay, h = _states(x, dt, A, B, chunk_state, starts, document_state)
        before = jnp.concatenate([chunk_state[:, None], h[:, :-1]], axis=1)
        if starts is not None:
            before = jnp.where(_of_state(starts), document_state[:, None], before)
        decayed = decay * before

        # The states' cotangents, the last first: dh_t = C_t dy_t + decay_{t+1} dh_{t+1}.
        direct = C[..., None] * dy[:, :, None]
        direct = direct.at[:, -1].add(after)
        ends = None if starts is None else jnp.roll(starts, -1, axis=1)
        dh = _prefixes(jnp.roll(decay, -1, axis=1), direct, ends, reverse=True)

        du = (dh * B[..., None]).sum(2)
        ddecay = dh * decayed
        ddelta = du * x + (ddecay * A[None, None]).sum(2)
        dA = dA + (ddecay * delta[:, :, None]).sum((0, 1))
        dB = (dh * (delta * x)[:, :, None]).sum(3)
        dC = (h * dy[:, :, None]).sum(3)
        after = decay[:, 0] * dh[:, 0]
        if starts is not None:
            ddocument = ddocument + jnp.where(_of_state(starts), decay * dh, 0).sum(1)
            after = jnp.where(starts[:, 0, None, None], 0, after)
        return (after, ddocument, dA), (du * delta, ddelta * jax.nn.sigmoid(dt), dB, dC)

    ddocument = None if starts is None else jnp.zeros_like(dh)
    (dh, ddocument, dA), (dx, ddt, dB, dC) = lax.scan(
        chunk,
        (dh, ddocument, jnp.zeros_like(A)),
        (x, dt, B, C, chunk_states, dy, starts),
        reverse=True,
    )
    return dx, ddt, dA, dB, dC, dh, None, ddocument


_scan.defvjp(_scan_fwd, _scan_bwd)


def _states(
    x: Array,
    dt: Array,
    A: Array,
    B: Array,
    chunk_state: Array,
    starts: Array | None,
    document_state: Array | None,
) -> tuple[Array, Array, Array]:
    """delta, the decays and the states of one chunk, after the state `chunk_state`."""
    delta = jax.nn.softplus(dt)
    decay = jnp.exp(delta[:, :, None] * A[None, None])
    u = (delta * x)[:, :, None] * B[..., None]
    if starts is None or document_state is None:
        u = u.at[:, 0].add(decay[:, 0] * chunk_state)
    else:
        before = jnp.where(_of_state(starts), document_state[:, None], 0)
        before = before.at[:, 0].set(
            jnp.where(starts[:, 0, None, None], document_state, chunk_state)
        )
        u = u + decay * before
    return delta, decay, _prefixes(decay, u, starts)


def _prefixes(
    decay: Array,
    u: Array,
    starts: Bool[Array, "batch steps"] | None,
    reverse: bool = False,
) -> Array:
    """h_t = decay_t h_{t-1} + u_t from h = 0, and h_t = u_t at starts, along axis 1."""

    def compose(first: tuple[Any, ...], then: tuple[Any, ...]) -> tuple[Any, ...]:
        decay, u, start = then
        h = decay * first[1] + u
        if start is None:
            return decay * first[0], h, None
        return decay * first[0], jnp.where(start, u, h), first[2] | start

    starts = None if starts is None else _of_state(starts)
    return lax.associative_scan(compose, (decay, u, starts), reverse=reverse, axis=1)[1]


def _of_state(starts: Bool[Array, "batch steps"]) -> Bool[Array, "batch steps 1 1"]:
    return starts[:, :, None, None]
