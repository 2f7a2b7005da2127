"""Exponentials by powers of two, for kernels: GPUs have a unit for those, which errs by 2**-22."""

import math

import jax.numpy as jnp

from hymba_jax.types import Array

LOG2_E = math.log2(math.e)


def exp(v: Array) -> Array:
    return jnp.exp2(v * LOG2_E)


def sigmoid(v: Array) -> Array:
    return 1.0 / (1.0 + exp(-v))
