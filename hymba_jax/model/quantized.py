"""Weights in 8 bits for inference: each kernel's outputs have a scale of their own."""

from typing import Any

from flax import nnx

from hymba_jax.model.hymba import Hymba
from hymba_jax.model.layers import Linear, QuantizedLinear


def quantize_kernels(model: Hymba) -> Hymba:
    """The same model, changed in place: linear maps and the output projection are quantized.

    The embedding, of which a token reads one row, stays as it is, and so do norms, convolutions and
    Mamba's dt_proj, as they are small.

    Args:
      model: without adapters.
    """
    replaced: dict[int, QuantizedLinear] = {}  # shared maps stay shared

    def quantized(linear: Linear) -> QuantizedLinear:
        if id(linear) not in replaced:
            replaced[id(linear)] = QuantizedLinear(linear.kernel[...])
        return replaced[id(linear)]

    small = {"dt_proj"}
    owners: list[tuple[Any, str, Linear]] = [
        (module, name, value)
        for _, module in nnx.iter_modules(model)
        for name, value in vars(module).items()
        if isinstance(value, Linear) and name not in small and module is not model
    ]
    for module, name, linear in owners:
        setattr(module, name, quantized(linear))
    kernel = model.output_projection[...]
    model.quantized_output = QuantizedLinear(kernel.T if model.config.tie_embeddings else kernel)
    if not model.config.tie_embeddings:
        del model.lm_head  # else its floats would stay in memory
    return model
