"""One layer, and the groups of layers that are compiled once."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
from flax import nnx

from hymba_jax.config import ComputeConfig, HymbaConfig
from hymba_jax.config.adapter import AdapterConfig
from hymba_jax.config.layer_pattern import LayerSpec
from hymba_jax.model.context import Context
from hymba_jax.model.kv_cache import AttendedKV, KVCache
from hymba_jax.model.layer_step import layer_step, takes_step
from hymba_jax.model.layers import make_norm
from hymba_jax.model.lora import add_adapters, start_dropout
from hymba_jax.model.mixer import make_mixer
from hymba_jax.model.mlp import MLP
from hymba_jax.model.state import LayerOutput, LayerState, RecurrentState, StateFormats
from hymba_jax.ops.remat import ACTIVATION, ATTENTION, MATMUL, NORM, SCAN, named
from hymba_jax.parallel.mesh import constrain
from hymba_jax.types import Array, Float, Key

REMAT_POLICIES: dict[str, Callable[..., bool] | None] = {
    "block": None,
    "kernels": jax.checkpoint_policies.save_only_these_names(SCAN, ATTENTION, NORM),
    "dots": jax.checkpoint_policies.save_only_these_names(SCAN, ATTENTION, NORM, MATMUL),
    "activations": jax.checkpoint_policies.save_only_these_names(
        SCAN, ATTENTION, NORM, MATMUL, ACTIVATION
    ),
}


class WithMeta(NamedTuple):
    """A value for the meta tokens, computed once, and one for the sequences that follow them.

    Attributes:
      meta: None in a model without meta tokens.
    """

    meta: Any
    tokens: Any


class Block(nnx.Module):
    """x + mixer(norm(x)), then, unless the layer's spec says otherwise, x + mlp(norm(x))."""

    def __init__(
        self, config: HymbaConfig, spec: LayerSpec, compute: ComputeConfig, rngs: nnx.Rngs
    ):
        self.mixer_norm = make_norm(config.hidden_size, "hidden", config.norm_eps, compute)
        self.mixer = make_mixer(config, spec, compute, rngs)
        self.has_mlp = spec.mlp
        if self.has_mlp:
            self.mlp_norm = make_norm(config.hidden_size, "hidden", config.norm_eps, compute)
            self.mlp = MLP(config, compute, rngs)
        self.dropout_keys: nnx.Variable[Array] | None = nnx.data(None)  # see `lora.set_dropout`

    def __call__(
        self,
        x: Float[Array, "batch length hidden"],
        context: Context,
        state: LayerState,
        meta: KVCache | None,
        shared: AttendedKV | None,
    ) -> LayerOutput:
        """The layer's output for positions that follow a state.

        Args:
          meta: keys and values of the meta tokens; None where x are the meta tokens.
          shared: keys and values of the layer before, for a layer that reuses them.
        """
        if takes_step(self, x, context, state, shared):
            return layer_step(self, x, context, state, meta, shared)
        x, normed = self.mixer_norm.of_residual(x)
        mixed, kv, ssm = self.mixer(normed, context, state, meta, shared)
        x = constrain(x + mixed, "batch", "length", None)
        if self.has_mlp:
            x, normed = self.mlp_norm.of_residual(named(ACTIVATION, x))
            x = constrain(x + self.mlp(normed), "batch", "length", None)
        return LayerOutput(x, kv, ssm)

    def replay(
        self, x: Float[Array, "batch length hidden"], context: Context, state: LayerState
    ) -> RecurrentState | None:
        """The SSM heads' state after the valid positions of the layer's input.

        Its matmuls are those of `__call__`, which XLA computes once.
        """
        return self.mixer.replay(self.mixer_norm(x), context, state)

    def full_forward(
        self,
        x: WithMeta,
        context: WithMeta,
        shared: WithMeta,
    ) -> WithMeta:
        """The layer's output for sequences that start from the state after the meta tokens."""
        if x.meta is None or context.meta is None:
            meta, start = None, self.mixer.init_state(1, 0, StateFormats(x.tokens.dtype))
        else:
            meta = self(x.meta, context.meta, LayerState(), None, shared.meta)
            start = LayerState(meta.kv and KVCache.of(meta.kv.new), meta.ssm)
        behind = LayerState(ssm=start.ssm)
        start_dropout(self)
        return WithMeta(meta, self(x.tokens, context.tokens, behind, start.kv, shared.tokens))


@partial(jax.jit, static_argnums=0)
def run_block(graph: nnx.GraphDef[Block], params: nnx.State, *inputs: Any) -> LayerOutput:
    """`Block.__call__`, which is traced and lowered once for all equal layers."""
    return nnx.merge(graph, params)(*inputs)


@partial(jax.jit, static_argnums=0)
def run_replay(
    graph: nnx.GraphDef[Block], params: nnx.State, *inputs: Any
) -> RecurrentState | None:
    """`Block.replay`, likewise."""
    return nnx.merge(graph, params).replay(*inputs)


@partial(jax.jit, static_argnums=0)
def run_full_forward(graph: nnx.GraphDef[Block], params: nnx.State, *inputs: Any) -> WithMeta:
    """`Block.full_forward`, likewise."""
    return nnx.merge(graph, params).full_forward(*inputs)


class LayerGroup(nnx.Module):
    """Consecutive layers; keys and values are shared only among them.

    Args:
      keys: one PRNG key per layer.
    """

    def __init__(
        self,
        config: HymbaConfig,
        specs: Sequence[LayerSpec],
        compute: ComputeConfig,
        keys: Key[Array, " layers"],
        adapter: AdapterConfig,
    ):
        self.blocks = nnx.List(
            Block(config, spec, compute, nnx.Rngs(keys[i])) for i, spec in enumerate(specs)
        )
        if adapter:
            for i, block in enumerate(self.blocks):
                add_adapters(block, adapter, nnx.Rngs(jax.random.fold_in(keys[i], 1)))
        self.remat = compute.remat

    def __call__(
        self,
        x: Float[Array, "batch length hidden"],
        context: Context,
        states: Sequence[LayerState],
        metas: Sequence[KVCache | None],
    ) -> list[LayerOutput]:
        """Each layer's output for positions that follow a state."""
        shared, outputs = None, []
        for block, state, meta in zip(self.blocks, states, metas, strict=True):
            outputs.append(run_block(*nnx.split(block), x, context, state, meta, shared))
            x, shared, _ = outputs[-1]
        return outputs

    def full_forward(self, x: WithMeta, context: WithMeta) -> list[WithMeta]:
        """Each layer's output for sequences that start from the state after the meta tokens.

        Meta tokens and sequences go through a layer in turn, so that its parameters are gathered
        once.
        """
        run: Callable[..., WithMeta] = run_full_forward
        if self.remat != "none":
            run = jax.checkpoint(run, policy=REMAT_POLICIES[self.remat], static_argnums=0)
        shared: WithMeta = WithMeta(None, None)
        outputs = []
        for block in self.blocks:
            meta, tokens = run(*nnx.split(block), x, context, shared)
            x = WithMeta(meta and meta.x, tokens.x)
            shared = WithMeta(meta and meta.kv, tokens.kv)
            outputs.append(x)
        return outputs


class ScannedLayers(nnx.Module):
    """Equal groups whose parameters are stacked along a leading axis, applied by one scan.

    Args:
      keys: PRNG keys, (groups, layers of a group).
    """

    def __init__(
        self,
        config: HymbaConfig,
        specs: Sequence[LayerSpec],
        compute: ComputeConfig,
        keys: Key[Array, "groups layers"],
        adapter: AdapterConfig,
    ):
        make_groups = nnx.vmap(
            lambda group_keys: LayerGroup(config, specs, compute, group_keys, adapter)
        )
        self.group = make_groups(keys)

    def full_forward(self, x: WithMeta, context: WithMeta, *, keep_all: bool) -> list[WithMeta]:
        """The last layer's output, preceded by those of the others if they are to be kept."""
        graph, params = nnx.split(self.group)

        def run_group(x: WithMeta, group_params: nnx.State) -> tuple[WithMeta, list[WithMeta]]:
            outputs = nnx.merge(graph, group_params).full_forward(x, context)
            return outputs[-1], outputs if keep_all else []

        x, stacked = jax.lax.scan(run_group, x, params)
        if not keep_all:
            return [x]
        apart = (jax.tree.map(lambda a, i=i: a[i], stacked) for i in range(len(stacked[0].tokens)))
        return [layer for group in apart for layer in group]
