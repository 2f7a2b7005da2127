"""The building blocks of every layer: linear maps and a norm.

Parameters name their logical axes in the metadata `axes`; `parallel/mesh.py` has the one
table from those to the axes of a device mesh.
"""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from hymba_jax.config import ComputeConfig
from hymba_jax.ops.int8_matmul import int8_matmul, quantize
from hymba_jax.ops.matmul import matmul
from hymba_jax.ops.rms_norm import rms_norm, rms_norm_of_residual
from hymba_jax.parallel.mesh import gather_param
from hymba_jax.types import Array, Float

INIT_STD = 0.02


class Linear(nnx.Module):
    """x @ kernel without bias; the kernel is (in, out). An adapter may update it (`lora.py`).

    Args:
      axes: logical axes of the kernel.
      dtype: of the matmul; the compute dtype unless told otherwise.
      init: normal(0.02) unless told otherwise.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        axes: tuple[str, str],
        compute: ComputeConfig,
        rngs: nnx.Rngs,
        *,
        dtype: DTypeLike | None = None,
        init: nnx.Initializer | None = None,
    ):
        init = init or nnx.initializers.normal(INIT_STD)
        kernel = init(rngs.params(), (in_features, out_features), compute.param_dtype)
        self.kernel = nnx.Param(kernel, axes=axes)
        self.dtype = dtype or compute.dtype
        self.adapter: Callable[..., Any] | None = nnx.data(None)

    @jax.named_scope("projection")
    def __call__(self, x: Float[Array, "*leading features"]) -> Float[Array, "*leading outputs"]:
        return self.project(x) if self.adapter is None else self.adapter(x, self)

    def project(self, x: Float[Array, "*leading features"]) -> Float[Array, "*leading outputs"]:
        """x @ kernel, without an adapter."""
        kernel = self.kernel[...].astype(self.dtype)
        return matmul(x.astype(self.dtype), kernel, axes=self.kernel.get_metadata("axes"))


class FusedSlice(nnx.Module):
    """A slice of a fused linear map, whose output is computed once."""

    def __init__(self, fused: Linear, start: int, stop: int):
        self.fused = fused
        self.start, self.stop = start, stop

    @property
    def width(self) -> int:
        return self.stop - self.start

    def __call__(self, x: Float[Array, "*leading features"]) -> Float[Array, "*leading outputs"]:
        return self.fused(x)[..., self.start : self.stop]


class QuantizedLinear(nnx.Module):
    """x @ (kernel * scale), with a kernel of 8-bit integers."""

    def __init__(self, kernel: Float[Array, "features outputs"]):
        integers, scale = quantize(kernel)
        self.kernel, self.scale = nnx.Param(integers), nnx.Param(scale)

    def __call__(self, x: Float[Array, "*leading features"]) -> Float[Array, "*leading outputs"]:
        return int8_matmul(x, self.kernel[...], self.scale[...])


def input_projections(modules: Iterable[Any]) -> list[tuple[Any, str]]:
    """The linear maps of modules that have the same input, their `INPUT_PROJECTIONS`: owner and
    name, in the order in which they are fused."""
    return [
        (module, name)
        for module in modules
        if module is not None
        for name in module.INPUT_PROJECTIONS
        if hasattr(module, name)
    ]


class RMSNorm(nnx.Module):
    """x / rms(x) * scale over the last axis; the mean square in float32.

    Args:
      shape: of the scale; (features,), or (heads, features) for a norm per head.
    """

    def __init__(self, shape: tuple[int, ...], axes: tuple[str, ...], eps: float, dtype: DTypeLike):
        self.scale = nnx.Param(jnp.ones(shape, dtype), axes=axes)
        self.eps = eps
        # The one axis along which activations that are normalised may be sharded.
        self.axis = "channels" if axes[-1] == "channels" else None

    def __call__(self, x: Float[Array, "*leading features"]) -> Float[Array, "*leading features"]:
        return rms_norm(x, self.gathered(x.dtype), eps=self.eps, axis=self.axis)

    def of_residual(
        self, x: Float[Array, "batch length features"]
    ) -> tuple[Float[Array, "batch length features"], Float[Array, "batch length features"]]:
        """x, as the residual stream goes on, and its norm."""
        return rms_norm_of_residual(x, self.gathered(x.dtype), eps=self.eps)

    def gathered(self, dtype: DTypeLike) -> Float[Array, "*heads features"]:
        """The scale, in the dtype of what is normalised."""
        return gather_param(self.scale, dtype)


def make_norm(features: int, axis: str, eps: float, compute: ComputeConfig) -> RMSNorm:
    """An RMSNorm with one scale a feature."""
    return RMSNorm((features,), (axis,), eps, compute.param_dtype)


def uniform(bound: float) -> nnx.Initializer:
    """Uniform in [-bound, bound]."""

    def init(key: Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> Array:
        return jax.random.uniform(key, shape, minval=-bound, maxval=bound).astype(dtype)

    return init
