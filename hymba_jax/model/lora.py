"""Low-rank adapters of linear maps: LoRA, rsLoRA and DoRA.

    lora     y = x (W + s A B)              s = alpha / rank         arXiv 2106.09685
    rslora   y = x (W + s A B)              s = alpha / sqrt(rank)   arXiv 2312.03732
    dora     y = x (W + s A B) / n * m      n = norm(W + s A B)      arXiv 2402.09353

W is the frozen kernel, (in, out); A is (in, rank) and B, at first zero, (rank, out). In DoRA m, at
first norm(W), and n have an entry per output; n is a constant in the gradient (its section 4.3).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from hymba_jax.config import ComputeConfig
from hymba_jax.config.adapter import NO_ADAPTER, AdapterConfig
from hymba_jax.model.layers import Linear, uniform
from hymba_jax.model.trainable import matches
from hymba_jax.types import Array, Float, UInt


class LowRankUpdate(NamedTuple):
    """What an adapter makes of a kernel; of stacked layers each array has them in front.

    Attributes:
      scale: s.
      magnitude: m; None unless it is DoRA.
    """

    A: Float[Array, "*stack inputs rank"]
    B: Float[Array, "*stack rank outputs"]
    scale: float
    magnitude: Float[Array, "*stack outputs"] | None = None

    def merged(
        self, kernel: Float[Array, "*stack inputs outputs"]
    ) -> Float[Array, "*stack inputs outputs"]:
        """The updated kernel, computed in float32."""
        updated = self._sum(kernel)
        if self.magnitude is not None:
            updated *= (self.magnitude / column_norms(updated))[..., None, :]
        return updated.astype(kernel.dtype)

    def column_scale(
        self, kernel: Float[Array, "*stack inputs outputs"]
    ) -> Float[Array, "*stack outputs"]:
        """m / n of DoRA; n is a constant in the gradient."""
        assert self.magnitude is not None
        return self.magnitude / jax.lax.stop_gradient(column_norms(self._sum(kernel)))

    def _sum(self, kernel: Array) -> Array:
        """W + s A B."""
        product = jnp.matmul(self.A, self.B, precision=jax.lax.Precision.HIGHEST)
        return kernel.astype(jnp.float32) + self.scale * product


def column_norms(
    kernel: Float[Array, "*stack inputs outputs"],
) -> Float[Array, "*stack outputs"]:
    """The norm of each output's weights, in float32."""
    return jnp.linalg.norm(kernel.astype(jnp.float32), axis=-2)


class LoRA(nnx.Module):
    """The adapter of a linear map. Its parameters are float32, whatever those of the model are.

    Args:
      base: the linear map.
    """

    def __init__(self, base: Linear, adapter: AdapterConfig, rngs: nnx.Rngs):
        inputs, outputs = base.kernel.shape
        in_axis, out_axis = base.kernel.get_metadata("axes")
        compute, rank = ComputeConfig(param_dtype="float32"), adapter.rank
        self.A = Linear(
            inputs,
            rank,
            (in_axis, "rank"),
            compute,
            rngs,
            dtype=base.dtype,
            init=uniform(inputs**-0.5),
        )
        self.B = Linear(
            rank,
            outputs,
            ("rank", out_axis),
            compute,
            rngs,
            dtype=base.dtype,
            init=nnx.initializers.zeros,
        )
        if adapter.kind == "dora":
            self.magnitude = nnx.Param(column_norms(base.kernel[...]), axes=(out_axis,))
        self.scale, self.dropout = adapter.scale, adapter.dropout
        self.row_keys: nnx.Variable[Array] | None = nnx.data(None)

    def __call__(
        self, x: Float[Array, "*leading features"], base: Linear
    ) -> Float[Array, "*leading outputs"]:
        """The output of the base with the update; dropout concerns the update alone, as in peft."""
        y, dropped = base.project(x), self._drop(x)
        update = self.B(self.A(dropped)) * self.scale
        if not hasattr(self, "magnitude"):
            return y + update
        scale = jnp.broadcast_to(
            self.update.column_scale(base.kernel[...]).astype(y.dtype), y.shape
        )
        from_dropped = y if dropped is x else base.project(dropped)
        return y + (scale - 1) * from_dropped + scale * update

    @property
    def update(self) -> LowRankUpdate:
        magnitude = self.magnitude[...] if hasattr(self, "magnitude") else None
        return LowRankUpdate(self.A.kernel[...], self.B.kernel[...], self.scale, magnitude)

    def _drop(self, x: Array) -> Array:
        if self.row_keys is None:
            return x
        keep = 1 - self.dropout
        kept = jax.vmap(lambda key: jax.random.bernoulli(key, keep, x.shape[1:]))
        return jnp.where(kept(self.row_keys[...]), x / keep, 0)


def add_adapters(block: nnx.Module, adapter: AdapterConfig, rngs: nnx.Rngs) -> None:
    """Gives each projection of a block that is a target its adapter."""
    for path, module in [*nnx.iter_modules(block)]:
        if isinstance(module, Linear) and matches(".".join(map(str, path)), adapter.targets):
            module.adapter = LoRA(module, adapter, rngs)


def merge_adapters[M: nnx.Module](model: M) -> M:
    """The model, changed in place: adapters are merged into the kernels, and gone."""
    for _, module in [*nnx.iter_modules(model)]:
        if isinstance(module, Linear) and isinstance(module.adapter, LoRA):
            module.kernel[...] = module.adapter.update.merged(module.kernel[...])
            module.adapter = None
    if hasattr(model, "adapter"):
        model.adapter = NO_ADAPTER
    return model


def reset_magnitudes(model: nnx.Module) -> None:
    """Makes the magnitudes of DoRA the norms of the kernels, in place: then adapters do nothing."""
    for _, module in nnx.iter_modules(model):
        if not isinstance(module, Linear) or not isinstance(module.adapter, LoRA):
            continue
        if hasattr(module.adapter, "magnitude"):
            module.adapter.magnitude[...] = column_norms(module.kernel[...])


def set_dropout(model: Any, seeds: UInt[Array, " rows"]) -> None:
    """Turns dropout on for the next `full_forward`, in place.

    What is dropped in a row depends on its seed alone, so neither on the rows beside it nor on how
    layers and devices hold them.
    """
    keys = jax.vmap(jax.random.key)(seeds)
    layers = jax.vmap(jax.vmap(jax.random.fold_in, (0, None)), (None, 0))(
        keys, jnp.arange(model.config.num_layers)
    )
    start = 0
    for group, repeats in model.repeated_groups():
        size = len(group.blocks)
        for i, block in enumerate(group.blocks):
            own = layers[start + i : start + size * repeats : size]
            block.dropout_keys = nnx.Variable(own if repeats > 1 else own[0])
        start += size * repeats


def start_dropout(block: Any) -> None:
    """Gives a block's adapters keys of their own, if dropout is on; from then on they drop."""
    if block.dropout_keys is None:
        return
    for i, (_, module) in enumerate(nnx.iter_modules(block)):
        if isinstance(module, LoRA):
            keys = jax.vmap(jax.random.fold_in, (0, None))(block.dropout_keys[...], i)
            module.row_keys = nnx.Variable(keys)
