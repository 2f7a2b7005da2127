"""SSD as Mosaic GPU kernels for Hopper (section 6 of arXiv 2405.21060): forward and backward, in
bfloat16.

Here is what is one number per position and head: time steps and decays, whose gradients XLA takes.
What is as large as x, and the matmuls, are in the kernels (`gpu_kernels`). As in `chunked`, decays
are differences of sums that start anew in each chunk and each document.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from hymba_jax.ops.documents import Documents
from hymba_jax.ops.remat import SCAN, named
from hymba_jax.ops.ssd import gpu_kernels
from hymba_jax.ops.ssd.gpu_kernels import (
    Inputs,
    backward_given,
    backward_read,
    backward_states,
    forward,
)
from hymba_jax.types import Array, Bool, Float

# What registers hold. Narrower heads and states are padded to a swizzled row, 128 bytes.
_MAX_HEAD_DIM, _MAX_STATE = 64, 128
_SWIZZLED = 64


def ssd_pallas_gpu(
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
    """`ssd` on Hopper GPUs; elsewhere only in Pallas's interpret mode.

    Operands of matmuls are bfloat16; sums and the state are float32.

    Raises:
      ValueError: x, B or C is not bfloat16, heads have more than 64 channels or the state more than
        128 entries a channel, or it is compiled for a CPU outside interpret mode.
    """
    if not supports(x, B, C):
        raise ValueError(
            f"ssd 'pallas_gpu' supports bfloat16, up to {_MAX_HEAD_DIM} channels of a head and up "
            f"to {_MAX_STATE} states, not {x.dtype}, {B.dtype} and {C.dtype}, {x.shape[-1]} and "
            f"{B.shape[-1]}"
        )
    batch, length, heads, head_dim = x.shape
    state = B.shape[-1]
    dt = dt.astype(jnp.float32)
    if dt_bias is not None:
        dt = dt + dt_bias.astype(jnp.float32)[None, None]
    if initial_state is None:
        initial_state = jnp.zeros((batch, heads, head_dim, state), jnp.float32)

    def whole_chunks(v: Array) -> Array:
        return _pad(v, 1, gpu_kernels.CHUNK)

    def whole_rows(v: Array) -> Array:
        return _pad(v, -1, _SWIZZLED)

    def whole_state(v: Array) -> Array:
        return whole_rows(_pad(v.astype(jnp.float32), -2, _SWIZZLED))

    # Padded with zero, which leaves the state unchanged.
    delta = whole_chunks(jax.nn.softplus(dt))
    starts = None if documents is None else whole_chunks(documents.starts)
    y, final_state = _ssd(
        Inputs(
            x=whole_rows(whole_chunks(x)),
            B=whole_rows(whole_chunks(B)),
            C=whole_rows(whole_chunks(C)),
            D=jnp.zeros(heads, jnp.float32) if D is None else D.astype(jnp.float32),
            **_weights(jnp.swapaxes(delta, 1, 2), A.astype(jnp.float32), starts),
            initial_state=whole_state(initial_state),
            document_state=None if documents is None else whole_state(documents.state),
        )
    )
    return y[:, :length, :, :head_dim], final_state[:, :, :head_dim, :state]


def supports(x: Array, B: Array, C: Array) -> bool:
    """Whether there are kernels for such arrays."""
    is_narrow = x.shape[-1] <= _MAX_HEAD_DIM and B.shape[-1] <= _MAX_STATE
    return is_narrow and x.dtype == B.dtype == C.dtype == jnp.bfloat16


def _pad(v: Array, axis: int, multiple: int) -> Array:
    """Zeros up to a multiple; arrays that fit are not copied."""
    pads = [(0, 0)] * v.ndim
    pads[axis] = (0, -v.shape[axis] % multiple)
    return jnp.pad(v, pads) if pads[axis][1] else v


def _weights(
    delta: Float[Array, "batch ssm_heads length"],
    A: Float[Array, "ssm_heads"],
    starts: Bool[Array, "batch length"] | None,
) -> dict[str, Array]:
    """The fields of `Inputs` that follow from time steps, decay rates and documents."""
    steps = gpu_kernels.CHUNK
    by_chunk = delta.reshape(*delta.shape[:2], -1, steps)
    reads = jnp.tri(steps, dtype=bool)[None, None, None]
    if starts is not None:
        starts = starts.reshape(starts.shape[0], -1, steps)
        document = jnp.cumsum(starts, axis=2)[:, None]  # 0 is that of the chunk before
        reads = reads & (document[..., :, None] == document[..., None, :])
    # A sum over none but the positions of the document loses no digits to others.
    decays = (by_chunk * A[None, :, None, None])[..., None, :]
    total = jnp.where(reads, decays, 0).sum(-1)
    read, kept, to_end = jnp.exp(total), jnp.exp(total[..., -1]), total[..., -1:] - total
    of_documents = {}
    if starts is not None:
        is_new, is_last = document > 0, document == document[..., -1:]
        first = lax.cummax(jnp.where(starts, jnp.arange(steps, dtype=jnp.int32), 0), axis=2)
        of_documents = {
            "first": first.reshape(first.shape[0], -1),
            "read_document": jnp.where(is_new, read, 0).reshape(delta.shape),
            "kept_document": jnp.where(is_new[..., -1], kept, 0),
        }
        read, kept = jnp.where(is_new, 0, read), jnp.where(is_new[..., -1], 0, kept)
        to_end = jnp.where(is_last, to_end, -jnp.inf)
    return {
        "delta": delta,
        "total": total.reshape(delta.shape),
        "read": read.reshape(delta.shape),
        "write": (by_chunk * jnp.exp(to_end)).reshape(delta.shape),
        "kept": kept,
        **of_documents,
    }


@jax.custom_vjp
def _ssd(inputs: Inputs) -> tuple[Array, Array]:
    y, final_state, _ = forward(inputs, keep_states=False)
    return y, final_state


def _ssd_fwd(inputs: Inputs) -> tuple[tuple[Array, Array], tuple[Inputs, Array | None]]:
    y, final_state, states = named(SCAN, forward(inputs, keep_states=True))
    return (y, final_state), (inputs, states)


def _ssd_bwd(residuals: tuple[Inputs, Array], cotangents: tuple[Array, Array]) -> tuple[Inputs]:
    (inputs, states), (dy, dfinal_state) = residuals, cotangents
    of_states = backward_states(inputs, states, dy, dfinal_state)
    read = backward_read(inputs, states, dy)
    given = backward_given(inputs, of_states["states"], dy)

    def of_group(parts: Array, like: Array) -> Array:
        """The sum over a group's blocks of heads."""
        batch, length, groups, state = like.shape
        return parts.reshape(batch, length, groups, -1, state).sum(3).astype(like.dtype)

    gradients: dict[str, Any] = {
        "x": given["x"],
        "B": of_group(given["B"], inputs.B),
        "C": of_group(read["C"], inputs.C),
        "D": read["D"].sum((0, 2)),
        "delta": given["delta"],
        "total": read["total"] - inputs.delta * given["delta"],
        "read": read["read"],
        "write": given["write"],
        "kept": of_states["kept"].sum(-1),
        "initial_state": of_states["initial_state"],
    }
    if inputs.first is not None:
        gradients |= {
            "read_document": read["read_document"],
            "kept_document": of_states["kept_document"].sum(-1),
            "document_state": of_states["document_state"],
        }
    return (Inputs(**gradients),)


_ssd.defvjp(_ssd_fwd, _ssd_bwd)
