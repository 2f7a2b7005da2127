"""One position of the causal convolution on GPUs, for decoding."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from hymba_jax.ops.causal_conv.final_inputs import final_inputs_of
from hymba_jax.ops.causal_conv.reference import causal_conv_reference
from hymba_jax.ops.causal_conv.step_gpu import causal_conv_step_gpu, supports
from hymba_jax.types import Array, Float, Int


def causal_conv_step(
    x: Float[Array, "batch 1 channels"],
    weight: Float[Array, "kernel channels"],
    bias: Float[Array, "channels"],
    initial_inputs: Float[Array, "batch kernel-1 channels"],
    lengths: Int[Array, "batch"] | None,
) -> tuple[Float[Array, "batch 1 channels"], Float[Array, "batch kernel-1 channels"]]:
    """`causal_conv` of one position, inside `shard_map`."""
    if not supports(x.shape[2], weight.shape[0]):
        return _by_xla(x, weight, bias, initial_inputs, lengths)
    if lengths is None:
        lengths = jnp.ones(len(x), jnp.int32)
    return _by_kernel(x, weight, bias, initial_inputs, lengths)


def _by_xla(
    x: Array, weight: Array, bias: Array, initial_inputs: Array, lengths: Array | None
) -> tuple[Array, Array]:
    y = causal_conv_reference(x, weight, bias, initial_inputs, lengths=lengths)
    return y, final_inputs_of(x, initial_inputs, lengths=lengths)


@jax.custom_vjp
def _by_kernel(
    x: Array, weight: Array, bias: Array, initial_inputs: Array, lengths: Array
) -> tuple[Array, Array]:
    y, inputs = causal_conv_step_gpu(x[:, 0], weight, bias, initial_inputs, lengths)
    return y[:, None], inputs


def _forward(*arrays: Array) -> tuple[tuple[Array, Array], tuple[Array, ...]]:
    return _by_kernel(*arrays), arrays


def _backward(arrays: tuple[Array, ...], cotangents: tuple[Array, Array]) -> tuple[Any, ...]:
    *floats, lengths = arrays
    _, vjp = jax.vjp(partial(_by_xla, lengths=lengths), *floats)
    return (*vjp(cotangents), None)


_by_kernel.defvjp(_forward, _backward)
