"""The selective scan in plain XLA, for CPUs: a loop over time whose gradient recomputes states.

Starting an HLO op costs XLA:CPU as much as the arithmetic of a step, unless it can compile
the whole loop to one function, which runs on one thread. A sum over an axis prevents that, but a
dot does not; other sums are written out term by term.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from hymba_jax.ops.documents import Documents
from hymba_jax.ops.exp2 import LOG2_E
from hymba_jax.ops.platform import target_platform
from hymba_jax.ops.precision import dot
from hymba_jax.ops.remat import SCAN, named
from hymba_jax.ops.selective_scan.output import skip_and_gate
from hymba_jax.ops.selective_scan.softplus import softplus
from hymba_jax.ops.sequential_map import sequential_map
from hymba_jax.types import Array, Bool, Float

# The gradient keeps the state before every so many positions.
_CHUNK = 16
# Channels whose loop over time runs before that of the next ones: their states fit into a
# processor's first cache.
_BLOCK = 128


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
    documents: Documents | None = None,
) -> tuple[Float[Array, "batch length channels"], Float[Array, "batch state channels"]]:
    """`selective_scan` that stores one state per chunk for the gradient."""
    inputs, dt, A, B, C = (v.astype(jnp.float32) for v in (x, dt, A, B, C))
    if dt_bias is not None:
        dt = dt + dt_bias.astype(jnp.float32)[None, None]
    if initial_state is None:
        initial_state = jnp.zeros((len(x), *A.shape), jnp.float32)
    starts = document_state = None
    if documents is not None:
        starts, document_state = documents.starts, documents.state.astype(jnp.float32)
    initial_state = initial_state.astype(jnp.float32)
    y, final_state = _scan(A, inputs, dt, B, C, initial_state, starts, document_state)
    return skip_and_gate(y, inputs, D, z).astype(x.dtype), final_state


@jax.custom_vjp
def _scan(
    A: Float[Array, "state channels"],
    x: Float[Array, "batch length channels"],
    dt: Float[Array, "batch length channels"],
    B: Float[Array, "batch length state"],
    C: Float[Array, "batch length state"],
    h: Float[Array, "batch state channels"],
    starts: Bool[Array, "batch length"] | None,
    document_state: Float[Array, "batch state channels"] | None,
) -> tuple[Float[Array, "batch length channels"], Float[Array, "batch state channels"]]:
    """The recurrence alone: y and the last state."""
    return _scan_fwd(A, x, dt, B, C, h, starts, document_state)[0]


def _scan_fwd(
    A: Array, *rows: Array | None
) -> tuple[tuple[Array, Array], tuple[Array | None, ...]]:
    y, h, chunk_states = named(SCAN, _map_rows(partial(_scan_row, A), rows))
    x, dt, B, C, _, starts, document_state = rows
    return (y, h), (A, x, dt, B, C, starts, document_state, chunk_states)


def _scan_bwd(
    residuals: tuple[Any, ...], cotangents: tuple[Array, Array]
) -> tuple[Array | None, ...]:
    A, *rows = residuals
    backward = partial(_scan_row_backward, A)
    dA, dx, ddt, dB, dC, dh, ddocument = _map_rows(backward, (*rows, *cotangents))
    return dA.sum(0), dx, ddt, dB, dC, dh, None, ddocument


_scan.defvjp(_scan_fwd, _scan_bwd)


def _map_rows(function: Callable[[Any], Any], rows: tuple[Any, ...]) -> Any:
    """Rows in sequence on CPUs, whose cache has room for the states of one; else all at once."""
    on_cpu = target_platform() == "cpu"
    return sequential_map(function, rows) if on_cpu else jax.vmap(function)(rows)


def _scan_row(
    A: Float[Array, "state channels"], row: tuple[Any, ...]
) -> tuple[
    Float[Array, "length channels"],
    Float[Array, "state channels"],
    Float[Array, "blocks chunks state block"],
]:
    """y, the last state, and that before each chunk."""
    x, dt, B, C, h, starts, document_state = row
    x, dt = _rows_of_blocks(x), _rows_of_blocks(dt)

    def block(y: Array, of_block: tuple[Any, ...]) -> tuple[Array, tuple[Array, Array]]:
        j, A, h, document_state = of_block

        def step(t: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
            h, y = carry
            B_t, C_t, start = _at(t, (B, C, starts))
            delta, u = _discretise(*_at_block(t, j, (x, dt)))
            h = _decay(delta, A) * _before(h, start, document_state) + u[None] * B_t[:, None]
            return h, _put(y, t, j, dot(C_t, h))

        def chunk(carry: tuple[Array, Array], first: Array) -> tuple[tuple[Array, Array], Array]:
            end = jnp.minimum(first + _CHUNK, len(x))
            return lax.fori_loop(first, end, step, carry), carry[0]

        (h, y), chunk_states = lax.scan(chunk, (h, y), jnp.arange(0, len(x), _CHUNK))
        return y, (h, chunk_states)

    blocks = jnp.arange(x.shape[1]), *jax.tree.map(_blocks, (A, h, document_state))
    # y starts as x, of which nothing stays. Zeros would depend on nothing, and of a single row they
    # are in no loop: XLA would allocate and fill those of all layers before it computes the first.
    y, (h, chunk_states) = lax.scan(block, x, blocks)
    return y.reshape(len(x), -1), _joined(h), chunk_states


def _scan_row_backward(
    A: Float[Array, "state channels"], row: tuple[Any, ...]
) -> tuple[Array | None, ...]:
    x, dt, B, C, starts, document_state, chunk_states, dy, dh = row
    x, dt, dy = (_rows_of_blocks(v) for v in (x, dt, dy))

    def block(carry: tuple[Array, ...], of_block: tuple[Any, ...]) -> tuple[Any, Any]:
        before, dx, ddt, dB, dC = carry
        j, A, dh, document_state, chunk_states = of_block

        def chunk(carry: Any, at: tuple[Array, Array]) -> tuple[Any, None]:
            recomputed, gradients = carry
            first, chunk_state = at
            end = jnp.minimum(first + _CHUNK, len(x))

            def again(t: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
                h, before, dC = carry
                B_t, start = _at(t, (B, starts))
                x_t, dt_t, dy_t = _at_block(t, j, (x, dt, dy))
                delta, u = _discretise(x_t, dt_t)
                h = _before(h, start, document_state)
                before = lax.dynamic_update_index_in_dim(before, h, t - first, axis=0)
                h = _decay(delta, A) * h + u[None] * B_t[:, None]
                return h, before, _add(dC, t, dot(h, dy_t))

            _, before, dC = lax.fori_loop(first, end, again, (chunk_state, *recomputed))

            def back(k: Array, carry: tuple[Any, ...]) -> tuple[Any, ...]:
                dh, ddocument, dA, dx, ddt, dB = carry
                t = end - 1 - k
                B_t, C_t, start = _at(t, (B, C, starts))
                x_t, dt_t, dy_t = _at_block(t, j, (x, dt, dy))
                delta, u = _discretise(x_t, dt_t)
                dh = dh + dy_t[None] * C_t[:, None]
                du = dot(B_t, dh)
                dB = _add(dB, t, dot(dh, u))
                dh = dh * _decay(delta, A)
                dexponent = dh * before[t - first]
                ddelta = du * x_t + _sum_over_states(dexponent * A)
                dA = dA + delta[None] * dexponent
                dx = _put(dx, t, j, du * delta)
                if start is not None:
                    ddocument = ddocument + jnp.where(start, dh, 0)
                    dh = jnp.where(start, 0, dh)
                ddt = _put(ddt, t, j, ddelta * jax.nn.sigmoid(dt_t))
                return dh, ddocument, dA, dx, ddt, dB

            gradients = lax.fori_loop(0, end - first, back, gradients)
            return ((before, dC), gradients), None

        zeros = jnp.zeros_like(A)
        ddocument = None if starts is None else zeros
        ((before, dC), (dh, ddocument, dA, dx, ddt, dB)), _ = lax.scan(
            chunk,
            ((before, dC), (dh, ddocument, zeros, dx, ddt, dB)),
            (jnp.arange(0, len(x), _CHUNK), chunk_states),
            reverse=True,
        )
        return (before, dx, ddt, dB, dC), (dA, dh, ddocument)

    # `before` is carried only so that it is allocated once: no chunk reads another's.
    before = jnp.zeros((_CHUNK, len(A), x.shape[2]), jnp.float32)
    blocks = jnp.arange(x.shape[1]), *jax.tree.map(_blocks, (A, dh, document_state)), chunk_states
    carry = before, x, dt, jnp.zeros_like(B), jnp.zeros_like(C)  # as in the forward pass
    (_, dx, ddt, dB, dC), of_states = lax.scan(block, carry, blocks)
    dA, dh, ddocument = jax.tree.map(_joined, of_states)
    return dA, dx.reshape(len(x), -1), ddt.reshape(len(x), -1), dB, dC, dh, ddocument


def _rows_of_blocks(v: Float[Array, "length channels"]) -> Float[Array, "length blocks block"]:
    """Blocks of channels, of equal size."""
    channels = v.shape[1]
    return v.reshape(len(v), -1, channels if channels % _BLOCK else _BLOCK)


def _blocks(v: Float[Array, "state channels"]) -> Float[Array, "blocks state block"]:
    return _rows_of_blocks(v).swapaxes(0, 1)


def _joined(v: Float[Array, "blocks state block"]) -> Float[Array, "state channels"]:
    return v.swapaxes(0, 1).reshape(v.shape[1], -1)


def _at(t: Array, sequences: tuple[Array | None, ...]) -> tuple[Any, ...]:
    return jax.tree.map(lambda v: v[t], sequences)


def _at_block(t: Array, j: Array, sequences: tuple[Array, ...]) -> tuple[Array, ...]:
    return tuple(lax.dynamic_slice(v, (t, j, 0), (1, 1, v.shape[2]))[0, 0] for v in sequences)


def _put(sequence: Array, t: Array, j: Array, value: Array) -> Array:
    return lax.dynamic_update_slice(sequence, value[None, None], (t, j, 0))


def _add(sequence: Array, t: Array, value: Array) -> Array:
    return lax.dynamic_update_index_in_dim(sequence, sequence[t] + value, t, axis=0)


def _sum_over_states(v: Array) -> Array:
    return sum((v[n] for n in range(1, len(v))), start=v[0])


def _discretise(x: Array, dt: Array) -> tuple[Array, Array]:
    """delta = softplus(dt) and delta x."""
    delta = softplus(dt, lambda v: _exp2(v * LOG2_E))
    # Else XLA computes them once for each state.
    return lax.optimization_barrier((delta, delta * x))


def _before(h: Array, start: Array | None, document_state: Array | None) -> Array:
    """The state before a position, given that after the position before."""
    return h if start is None or document_state is None else jnp.where(start, document_state, h)


def _decay(delta: Array, A: Array) -> Array:
    return _exp2(delta[None] * (A * LOG2_E))


# Added to a small number, it leaves no room for a fraction in the 24 bits of a float32, and the
# lowest bits hold the number's integer plus the bias of the exponent.
_ROUNDER = 1.5 * 2**23 + 127


@jax.custom_jvp
def _exp2(x: Array) -> Array:
    """2**x of x <= 0. With XLA's the scan takes 1.6 times as long."""
    # x = whole + part with |part| <= 1/2; the Taylor polynomial of 2**part has error 1.2e-7. Below
    # 2**-126 the exponent's bits are those of zero.
    x = jnp.maximum(x, -127.0)
    rounded = x + _ROUNDER
    part = x - (rounded - _ROUNDER)
    power = _polynomial(part, [math.log(2) ** k / math.factorial(k) for k in range(7)])
    bits = lax.bitcast_convert_type(rounded, jnp.int32) << 23
    return power * lax.bitcast_convert_type(bits, jnp.float32)


_exp2.defjvps(lambda tangent, power, _: tangent * (math.log(2) * power))


def _polynomial(x: Array, coefficients: Sequence[float]) -> Array:
    """The sum of the coefficients times x**0, x**1, ... by Horner's rule."""
    *others, highest = coefficients
    value = jnp.full_like(x, highest)
    for coefficient in reversed(others):
        value = value * x + coefficient
    return value
