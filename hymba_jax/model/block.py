"""One layer, and the units of layers that are compiled once."""

from collections.abc import Callable, Sequence

import jax
from flax import nnx

from hymba_jax.config import ComputeConfig, HymbaConfig
from hymba_jax.layer_pattern import LayerSpec
from hymba_jax.model.cache import KeyValue, LayerPast
from hymba_jax.model.layers import rms_norm
from hymba_jax.model.mixer import Context, LayerOutput, make_mixer
from hymba_jax.model.mlp import MLP
from hymba_jax.sharding import constrain
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
        self,
        x: Float[Array, "batch length hidden"],
        context: Context,
        kv: KeyValue | None,
        past: LayerPast,
    ) -> LayerOutput:
        mixed, kv, ssm = self.mixer(self.mixer_norm(x), context, kv, past)
        x = constrain(x + mixed, "batch", "length", None)
        x = constrain(x + self.mlp(self.mlp_norm(x)), "batch", "length", None)
        return LayerOutput(x, kv, ssm)


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
        self, x: Float[Array, "batch length hidden"], context: Context
    ) -> list[Float[Array, "batch length hidden"]]:
        """Each layer's output."""
        return [output.x for output in self.after(x, context)]

    def after(
        self,
        x: Float[Array, "batch length hidden"],
        context: Context,
        pasts: Sequence[LayerPast] | None = None,
    ) -> list[LayerOutput]:
        """Each layer's output and memory, after what each remembers of the positions before x."""
        kv, outputs = None, []
        for block, past in zip(self.blocks, pasts or [LayerPast()] * len(self.blocks), strict=True):
            outputs.append(_run_block(block, self.remat, x, context, kv, past))
            x, kv, _ = outputs[-1]
        return outputs


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
        self, x: Float[Array, "batch length hidden"], context: Context, *, keep_all: bool = False
    ) -> list[Float[Array, "batch length hidden"]]:
        """The last layer's output, after those of the others if they are to be kept."""
        graph, params = nnx.split(self.units)

        def run_unit(x: Array, unit_params: nnx.State) -> tuple[Array, list[Array]]:
            outputs = nnx.merge(graph, unit_params)(x, context)
            return outputs[-1], outputs if keep_all else []

        x, stacked = jax.lax.scan(run_unit, x, params)
        return [output for unit in zip(*stacked, strict=True) for output in unit] or [x]


def _run_block(
    block: Block, remat: str, x: Array, context: Context, kv: KeyValue | None, past: LayerPast
) -> LayerOutput:
    """Runs a block, keeping for the backward pass what the policy says."""
    if remat == "none":
        return block(x, context, kv, past)
    graph, params = nnx.split(block)

    def run(params: nnx.State, x: Array, kv: KeyValue | None) -> LayerOutput:
        return nnx.merge(graph, params)(x, context, kv, past)

    return jax.checkpoint(run, policy=REMAT_POLICIES[remat])(params, x, kv)
