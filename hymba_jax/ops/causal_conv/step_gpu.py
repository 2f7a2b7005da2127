"""One position of the causal convolution on GPUs: a Pallas kernel in Triton that updates the last
inputs in place.

XLA copies them, as it writes the shifted inputs to an array of their own.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from hymba_jax.ops.block_size import largest_block
from hymba_jax.ops.kernel_cost import array_bytes, kernel_cost
from hymba_jax.types import Array, Float, Int

_MAX_BLOCK = 512  # channels of a program
_MIN_BLOCK = 16
_MAX_TAPS = 16


def supports(channels: int, taps: int) -> bool:
    """Whether the kernel takes so many channels, and taps, whose inputs are in registers."""
    return channels % _MIN_BLOCK == 0 and 2 <= taps <= _MAX_TAPS


def causal_conv_step_gpu(
    x: Float[Array, "batch channels"],
    weight: Float[Array, "kernel channels"],
    bias: Float[Array, "channels"],
    initial_inputs: Float[Array, "batch kernel-1 channels"],
    lengths: Int[Array, "batch"],
) -> tuple[Float[Array, "batch channels"], Float[Array, "batch kernel-1 channels"]]:
    """`causal_conv` of one position, without a gradient.

    Args:
      lengths: 1, or 0 where the position is padding.
    """
    batch, before, channels = initial_inputs.shape
    block = largest_block(_MAX_BLOCK, channels)
    by_row = pl.BlockSpec((None, block), lambda b, i: (b, i))
    of_inputs = pl.BlockSpec((None, before, block), lambda b, i: (b, 0, i))
    operands = (x, weight, bias, initial_inputs, lengths)
    y, inputs = pl.pallas_call(
        partial(_kernel, before),
        grid=(batch, channels // block),
        in_specs=[
            by_row,
            pl.BlockSpec((before + 1, block), lambda b, i: (0, i)),
            pl.BlockSpec((block,), lambda b, i: (i,)),
            of_inputs,
            pl.BlockSpec((None,), lambda b, i: (b,)),
        ],
        out_specs=[by_row, of_inputs],
        out_shape=[jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (x, initial_inputs)],
        input_output_aliases={3: 1},
        compiler_params=triton.CompilerParams(num_warps=4),
        cost_estimate=kernel_cost(
            flops=0, exponentials=x.size, hbm_bytes=array_bytes(operands, x, initial_inputs)
        ),
        name="causal_conv_step",
    )(*operands)
    return y, inputs


def _kernel(
    before: int,
    x_ref: Any,
    weight_ref: Any,
    bias_ref: Any,
    inputs_ref: Any,
    length_ref: Any,
    y_ref: Any,
    last_ref: Any,
) -> None:
    """Some channels of one sequence."""
    is_valid = length_ref[...] > 0
    inputs = [*(inputs_ref[i] for i in range(before)), x_ref[...]]
    y = bias_ref[...].astype(jnp.float32)
    for tap, value in enumerate(inputs):
        y = y + weight_ref[tap].astype(jnp.float32) * value.astype(jnp.float32)
    y = y.astype(y_ref.dtype).astype(jnp.float32)
    y = y * jax.nn.sigmoid(y)
    y_ref[...] = jnp.where(is_valid, y, 0.0).astype(y_ref.dtype)
    for i in range(before):
        last_ref[i] = jnp.where(is_valid, inputs[i + 1], inputs[i])
