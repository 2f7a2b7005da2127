"""One layer, and the units of layers that are compiled once."""

from collections.abc import Callable, Sequence

import jax
from flax import nnx

from hymba_jax.config import ComputeConfig, HymbaConfig
from hymba_jax.layer_pattern import LayerSpec
from hymba_jax.model.attention import KeyValue
from hymba_jax.model.layers import rms_norm
from hymba_jax.model.mixer import make_mixer
from hymba_jax.model.mlp import MLP
from hymba_jax.model.rope import Rope
from hymba_jax.types import Array, Float, Key

REMAT_POLICIES: dict[str, Callable[..., bool] | None] = {
    "block": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


class Block(nnx.Module):
    """x + mixer(norm(x)), then x + mlp(norm(x))."""

    def __init__(
        self, config: HymbaConfig, spec: LayerSpec, compute: ComputeConfig, rngs: nnx.Rngs
    ):
        self.mixer_norm = rms_norm(config.hidden_size, "hidden", config.norm_eps, compute)
        self.mixer = make_mixer(config, spec, compute, rngs)
        self.mlp_norm = rms_norm(config.hidden_size, "hidden", config.norm_eps, compute)
        self.mlp = MLP(config, compute, rngs)

    def __call__(
        self, x: Float[Array, "batch length hidden"], rope: Rope, kv: KeyValue | None
    ) -> tuple[Float[Array, "batch length hidden"], KeyValue | None]:
        mixed, kv = self.mixer(self.mixer_norm(x), rope, kv)
        x = x + mixed
        return x + self.mlp(self.mlp_norm(x)), kv


class Unit(nnx.Module):
    """Layers that stand together; keys and values pass between them and no further.

    Args:
      keys: one random key a layer.
    """

    def __init__(
        self,
        config: HymbaConfig,
        specs: Sequence[LayerSpec],
        compute: ComputeConfig,
        keys: Key[Array, " layers"],
    ):
        self.blocks = nnx.List(
            Block(config, spec, compute, nnx.Rngs(keys[i])) for i, spec in enumerate(specs)
        )
        self.remat = compute.remat

    def __call__(
        self, x: Float[Array, "batch length hidden"], rope: Rope, *, keep_outputs: bool = False
    ) -> tuple[Float[Array, "batch length hidden"], list[Float[Array, "batch length hidden"]]]:
        """The last layer's output, and each layer's if they are to be kept."""
        kv, outputs = None, []
        for block in self.blocks:
            x, kv = _run_block(block, self.remat, x, rope, kv)
            outputs.append(x)
        return x, outputs if keep_outputs else []


class Stack(nnx.Module):
    """Equal units whose parameters are stacked in front, walked by one scan.

    Args:
      keys: random keys, (units, layers of a unit).
    """

    def __init__(
        self,
        config: HymbaConfig,
        specs: Sequence[LayerSpec],
        compute: ComputeConfig,
        keys: Key[Array, "units layers"],
    ):
        make_units = nnx.vmap(lambda unit_keys: Unit(config, specs, compute, unit_keys))
        self.units = make_units(keys)

    def __call__(
        self, x: Float[Array, "batch length hidden"], rope: Rope, *, keep_outputs: bool = False
    ) -> tuple[Float[Array, "batch length hidden"], list[Float[Array, "batch length hidden"]]]:
        """The last layer's output, and each layer's if they are to be kept."""
        graph, params = nnx.split(self.units)

        def run_unit(x: Array, unit_params: nnx.State) -> tuple[Array, list[Array]]:
            return nnx.merge(graph, unit_params)(x, rope, keep_outputs=keep_outputs)

        x, stacked = jax.lax.scan(run_unit, x, params)
        return x, [output for unit in zip(*stacked, strict=True) for output in unit]


def _run_block(
    block: Block, remat: str, x: Array, rope: Rope, kv: KeyValue | None
) -> tuple[Array, KeyValue | None]:
    """Runs a block, keeping for the backward pass what the policy says."""
    if remat == "none":
        return block(x, rope, kv)
    graph, params = nnx.split(block)

    def run(params: nnx.State, x: Array, kv: KeyValue | None) -> tuple[Array, KeyValue | None]:
        return nnx.merge(graph, params)(x, rope, kv)

    return jax.checkpoint(run, policy=REMAT_POLICIES[remat])(params, x, kv)
