"""The selective scan in plain XLA, for CPUs: chunks, with a gradient that recomputes states.

The gradient keeps the states at the borders of chunks only. A chunk is unrolled, so that every
state and decay is an array of its own that is written once and stays in the cache: stacked by an
inner `lax.scan` they would be copied, on one thread. The barriers keep XLA from computing an
exponential once for each of its consumers.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from hymba_jax.types import Array, Float

_CHUNK = 8
_barrier = lax.optimization_barrier
# Accelerators would round the factors to fewer bits.
_einsum = partial(jnp.einsum, precision=lax.Precision.HIGHEST)


def selective_scan_xla(
    x: Float[Array, "batch length channels"],
    dt: Float[Array, "batch length channels"],
    A: Float[Array, "state channels"],
    B: Float[Array, "batch length state"],
    C: Float[Array, "batch length state"],
    D: Float[Array, "channels"] | None = None,
    z: Float[Array, "batch length channels"] | None = None,
    dt_bias: Float[Array, "channels"] | None = None,
    initial_state: Float[Array, "batch state channels"] | None = None,
) -> tuple[Float[Array, "batch length channels"], Float[Array, "batch state channels"]]:
    """`selective_scan` that stores one state a chunk for the gradient."""
    batch, length, _ = x.shape
    inputs, dt, A, B, C = (v.astype(jnp.float32) for v in (x, dt, A, B, C))
    if dt_bias is not None:
        dt = dt + dt_bias.astype(jnp.float32)[None, None]
    if initial_state is None:
        initial_state = jnp.zeros((batch, *A.shape), jnp.float32)

    steps = min(length, _CHUNK)
    chunks = math.ceil(length / steps)

    def split(v: Array, padding: float = 0.0) -> Array:
        pad = ((0, 0), (0, chunks * steps - length), (0, 0))
        return jnp.pad(v, pad, constant_values=padding).reshape(batch, chunks, steps, -1)

    # softplus(-inf) = 0, so the padding leaves the state as it is.
    y, final_state = _scan(
        split(inputs), split(dt, -jnp.inf), A, split(B), split(C), initial_state.astype(jnp.float32)
    )
    y = y.reshape(batch, chunks * steps, -1)[:, :length]

    if D is not None:
        y = y + D.astype(jnp.float32)[None, None] * inputs
    if z is not None:
        y = y * jax.nn.silu(z.astype(jnp.float32))
    return y.astype(x.dtype), final_state


@jax.custom_vjp
def _scan(
    x: Float[Array, "batch chunks steps channels"],
    dt: Float[Array, "batch chunks steps channels"],
    A: Float[Array, "state channels"],
    B: Float[Array, "batch chunks steps state"],
    C: Float[Array, "batch chunks steps state"],
    h: Float[Array, "batch state channels"],
) -> tuple[Float[Array, "batch chunks steps channels"], Float[Array, "batch state channels"]]:
    """The recurrence alone: y and the last state."""
    return _scan_fwd(x, dt, A, B, C, h)[0]


def _scan_fwd(
    x: Array, dt: Array, A: Array, B: Array, C: Array, h: Array
) -> tuple[tuple[Array, Array], tuple[Array, ...]]:
    def chunk(carry: tuple[Array, Array], i: Array) -> tuple[tuple[Array, Array], Array]:
        h, y = carry
        border = h
        x_i, dt_i, B_i, C_i = (_chunk(v, i) for v in (x, dt, B, C))
        delta, u = _discretise(x_i, dt_i)
        y_i = []
        for t in range(x.shape[2]):
            h = _exp(delta[:, t, None] * A[None]) * h + u[:, t, None] * B_i[:, t, :, None]
            h = _barrier(h)
            # Not an einsum: XLA would run the whole loop on one thread.
            y_i.append((h * C_i[:, t, :, None]).sum(1))
        return (h, _put(y, i, jnp.stack(y_i, 1))), border

    (h, y), borders = lax.scan(chunk, (h, jnp.zeros_like(x)), jnp.arange(x.shape[1]))
    return (y, h), (x, dt, A, B, C, borders)


def _scan_bwd(residuals: tuple[Array, ...], cotangents: tuple[Array, Array]) -> tuple[Array, ...]:
    x, dt, A, B, C, borders = residuals
    dy, dh = cotangents
    steps = range(x.shape[2])

    def chunk(carry: tuple[Array, ...], at: tuple[Array, Array]) -> tuple[tuple[Array, ...], None]:
        dh, dA, dx, ddt, dB, dC = carry
        i, h = at
        x_i, dt_i, B_i, C_i, dy_i = (_chunk(v, i) for v in (x, dt, B, C, dy))
        delta, u = _discretise(x_i, dt_i)

        decay, decayed = [], []
        for t in steps:
            decay.append(_barrier(_exp(delta[:, t, None] * A[None])))
            decayed.append(_barrier(decay[t] * h))
            h = decayed[t] + u[:, t, None] * B_i[:, t, :, None]

        du_i, ddelta_i, dB_i, dC_i = [], [], [], []
        for t in reversed(steps):
            dh = _barrier(dh + C_i[:, t, :, None] * dy_i[:, t, None])
            du = _einsum("bne,bn->be", dh, B_i[:, t])
            du_i.append(du)
            # Summed over the state term by term, which vectorises where a reduction does not.
            terms = (dh[:, n] * decayed[t][:, n] * A[n][None] for n in range(A.shape[0]))
            ddelta_i.append(sum(terms, start=du * x_i[:, t]))
            dB_i.append(_einsum("bne,be->bn", dh, u[:, t]))
            dC_i.append(_einsum("bne,be->bn", decayed[t], dy_i[:, t]))
            dA = dA + dh * decayed[t] * delta[:, t, None]
            dh = dh * decay[t]

        gradients = (jnp.stack(v[::-1], axis=1) for v in (du_i, ddelta_i, dB_i, dC_i))
        du, ddelta, dB_t, dC_t = _barrier(tuple(gradients))
        # y_t reads C_t from the whole state, `decayed` and u_t B_t.
        dC_t = dC_t + B_i * _einsum("bte,bte->bt", u, dy_i)[:, :, None]
        dx = _put(dx, i, du * delta)
        ddt = _put(ddt, i, ddelta * jax.nn.sigmoid(dt_i))
        return (dh, dA, dx, ddt, _put(dB, i, dB_t), _put(dC, i, dC_t)), None

    zeros = [jnp.zeros_like(v) for v in (dh, x, dt, B, C)]
    (dh, dA, dx, ddt, dB, dC), _ = lax.scan(
        chunk, (dh, *zeros), (jnp.arange(x.shape[1]), borders), reverse=True
    )
    return dx, ddt, dA.sum(0), dB, dC, dh


_scan.defvjp(_scan_fwd, _scan_bwd)


def _chunk(v: Array, i: Array) -> Array:
    return lax.dynamic_index_in_dim(v, i, axis=1, keepdims=False)


def _put(v: Array, i: Array, chunk: Array) -> Array:
    return lax.dynamic_update_index_in_dim(v, chunk, i, axis=1)


def _discretise(x: Array, dt: Array) -> tuple[Array, Array]:
    """delta = softplus(dt) and delta x."""
    delta = jnp.maximum(dt, 0) + jnp.log1p(jnp.exp(-jnp.abs(dt)))
    return _barrier((delta, delta * x))


def _exp(x: Array) -> Array:
    """exp of x <= 0 in two thirds of the time of XLA's: exponentials are most of the scan."""
    # x log2(e) = whole + part with |part| <= 1/2; Taylor's polynomial of 2**part errs by 1.2e-7.
    # Below 2**-126 the exponent's bits are those of zero.
    exponent = jnp.maximum(x * math.log2(math.e), -127.0)
    whole = jnp.round(exponent)
    part = exponent - whole
    power = jnp.zeros_like(x)
    for k in reversed(range(7)):
        power = power * part + math.log(2) ** k / math.factorial(k)
    return power * lax.bitcast_convert_type((whole.astype(jnp.int32) + 127) << 23, jnp.float32)
