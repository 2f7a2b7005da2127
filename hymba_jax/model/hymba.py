"""The whole model: meta tokens, layers, logits."""

import dataclasses
import functools
import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from hymba_jax.config import CacheFormat, ComputeConfig, HymbaConfig
from hymba_jax.config.adapter import NO_ADAPTER, AdapterConfig
from hymba_jax.config.layer_pattern import GroupSpec
from hymba_jax.model.block import Block, LayerGroup, ScannedLayers, WithMeta, run_replay
from hymba_jax.model.context import Context
from hymba_jax.model.kv_cache import KVCache
from hymba_jax.model.layers import INIT_STD, Linear, make_norm
from hymba_jax.model.rope import make_rope
from hymba_jax.model.state import LayerState, MetaState, ModelState, StateFormats
from hymba_jax.ops.documents import document_starts, first_positions
from hymba_jax.ops.matmul import matmul, matmul_transposed
from hymba_jax.parallel.mesh import constrain, gather_param
from hymba_jax.types import Array, Float, Int


class Hymba(nnx.Module):
    """A language model of hybrid-head layers behind learned meta tokens (paper, Fig. 2).

    Each layer's parameters are sampled with its own key, so they are the same whether repeated
    layers are scanned or not.

    Args:
      adapter: of the projections in the layers, see `hymba_jax.model.lora`.
    """

    def __init__(
        self,
        config: HymbaConfig,
        compute: ComputeConfig,
        rngs: nnx.Rngs,
        adapter: AdapterConfig = NO_ADAPTER,
    ):
        self.config = config
        self.compute = compute
        self.adapter = adapter
        normal = nnx.initializers.normal(INIT_STD)
        self.embedding = nnx.Param(
            normal(rngs.params(), (config.num_embeddings, config.hidden_size), compute.param_dtype),
            axes=("vocab", "hidden"),
        )
        if config.num_meta_tokens:
            shape = (config.num_meta_tokens, config.hidden_size)
            self.meta_tokens = nnx.Param(
                normal(rngs.params(), shape, compute.param_dtype), axes=("meta_tokens", "hidden")
            )
        layer_keys = jax.random.split(rngs.params(), config.num_layers)
        self.groups: nnx.List[ScannedLayers | LayerGroup] = nnx.List()
        start = 0
        for group in _layer_groups(config, compute.scan_layers):
            keys = layer_keys[start : start + group.num_layers]
            if group.repeats > 1:
                keys = keys.reshape(group.repeats, len(group.layers))
                self.groups.append(ScannedLayers(config, group.layers, compute, keys, adapter))
            else:
                self.groups.append(LayerGroup(config, group.layers, compute, keys, adapter))
            start += group.num_layers
        self.final_norm = make_norm(config.hidden_size, "hidden", config.norm_eps, compute)
        self.quantized_output: Callable[[Array], Array] | None = nnx.data(None)  # `quantized.py`
        if not config.tie_embeddings:
            self.lm_head = Linear(
                config.hidden_size, config.num_embeddings, ("hidden", "vocab"), compute, rngs
            )

    @classmethod
    @functools.cache
    def abstract(
        cls, config: HymbaConfig, compute: ComputeConfig, adapter: AdapterConfig = NO_ADAPTER
    ) -> "Hymba":
        """The model without values: shapes and dtypes of its parameters; nothing is computed.

        Traced once and shared by all callers, who must not change it.
        """
        return nnx.eval_shape(lambda: cls(config, compute, nnx.Rngs(0), adapter))

    def __call__(
        self,
        tokens: Int[Array, "batch length"],
        segment_ids: Int[Array, "batch length"] | None = None,
    ) -> Float[Array, "batch length vocab"]:
        """Logits in float32 for the token after each token.

        Args:
          segment_ids: the document of each token, where rows contain several. A document starts
            where the id changes; it starts from the meta tokens' state and is computed as if it
            were alone.

        Raises:
          ValueError: with segment_ids, the rotation depends on the length of each document.
        """
        return self._project(self.last_hidden_state(tokens, segment_ids))

    def last_hidden_state(
        self,
        tokens: Int[Array, "batch length"],
        segment_ids: Int[Array, "batch length"] | None = None,
    ) -> Float[Array, "batch length hidden"]:
        """The final norm's output, which the output projection makes logits of; see `__call__`."""
        *_, last = self._full_forward(tokens, segment_ids, keep_all=False)
        return self.final_norm(last.tokens)

    def hidden_states(
        self, tokens: Int[Array, "batch length"]
    ) -> Iterator[Float[Array, "batch positions hidden"]]:
        """The first layer's input and each layer's output, before the final norm.

        Those of the meta tokens come first in each row. Layers are computed as they are asked for,
        those of a group together.
        """
        for x in self._full_forward(tokens, None, keep_all=True):
            if x.meta is None:
                yield x.tokens
            else:
                yield jnp.concatenate([jnp.repeat(x.meta, len(tokens), 0), x.tokens], axis=1)

    def _full_forward(
        self,
        tokens: Int[Array, "batch length"],
        segment_ids: Int[Array, "batch length"] | None,
        *,
        keep_all: bool,
    ) -> Iterator[WithMeta]:
        num_meta_tokens, length = self.config.num_meta_tokens, tokens.shape[1]
        total = num_meta_tokens + length
        positions = jnp.arange(length)[None]
        if segment_ids is not None:
            if total > self.config.max_fixed_positions:
                raise ValueError(
                    f"segment_ids: with dynamic_ntk the rotation of {total} positions depends on "
                    "the length of each document"
                )
            positions = positions - first_positions(document_starts(segment_ids))
        rope = make_rope(self.config, num_meta_tokens + positions, total)
        context = Context(rope, segment_ids=segment_ids)
        meta_context = meta = None
        if num_meta_tokens:
            meta_context = Context(make_rope(self.config, _meta_positions(self.config), total))
            meta = self.embed_meta()
        contexts, x = WithMeta(meta_context, context), WithMeta(meta, self.embed(tokens))
        yield x
        for group in self.groups:
            if isinstance(group, ScannedLayers):
                outputs = group.full_forward(x, contexts, keep_all=keep_all)
            else:
                outputs = group.full_forward(x, contexts)
            yield from outputs
            x = outputs[-1]

    def meta_state(self) -> MetaState:
        """The state after the meta tokens, which every sequence starts from."""
        length = self.config.num_meta_tokens
        if not length:
            return self.init_state(1, 0).layers
        x, outputs = self.embed_meta(), []
        context = Context(make_rope(self.config, _meta_positions(self.config), length))
        for group in self._unrolled():
            nothing = [LayerState()] * len(group.blocks), [None] * len(group.blocks)
            outputs += group(x, context, *nothing)
            x = outputs[-1].x
        return tuple(
            LayerState(
                None if output.kv is None or spec.reuses_kv else KVCache.of(output.kv.new),
                output.ssm,
            )
            for spec, output in zip(self.config.layer_specs, outputs, strict=True)
        )

    def init_state(
        self,
        batch: int,
        max_length: int,
        state_dtype: DTypeLike = "float32",
        kv_cache: CacheFormat = "float",
    ) -> ModelState:
        """A state of zeros, for sequences of up to `max_length` tokens.

        Args:
          state_dtype: that SSM states are stored in; they are computed in float32.
          kv_cache: format of keys and values, "float" in the model's dtype or "int8".
        """
        formats = StateFormats(self.compute.dtype, state_dtype, kv_cache)
        layers = tuple(
            block.mixer.init_state(batch, max_length, formats) for block in self.blocks()
        )
        return ModelState(layers, jnp.zeros(batch, jnp.int32))

    def extend(
        self,
        tokens: Int[Array, "batch length"],
        state: ModelState,
        meta: MetaState,
        lengths: Int[Array, "batch"],
        *,
        is_start: bool = False,
    ) -> tuple[Float[Array, "batch length hidden"], ModelState]:
        """The last layer's output for tokens that follow a state, and the state after them.

        Equal to the full forward pass at those positions, whatever chunks a sequence comes in.

        Args:
          lengths: valid tokens of each row; the rest is padding and does not affect the state.
          is_start: every row's state is empty, so that the cache need not be attended to.
        """
        start = state.lengths
        context = self._context(tokens, start, lengths)
        if is_start:
            context = context._replace(start=None)
        before = iter(zip(state.layers, meta, strict=True))
        x, layers = self.embed(tokens), []
        for group in self._unrolled():
            states, metas = zip(*(next(before) for _ in group.blocks), strict=True)
            outputs = group(x, context, states, [layer.kv for layer in metas])
            # Updated after its last use, so that XLA updates it in place.
            x, kv = jax.lax.optimization_barrier((outputs[-1].x, [layer.kv for layer in states]))
            layers += [
                layer._replace(kv=cache).update(output, start, lengths)
                for layer, cache, output in zip(states, kv, outputs, strict=True)
            ]
        return x, ModelState(tuple(layers), start + lengths)

    def verify[T](
        self,
        tokens: Int[Array, "batch length"],
        state: ModelState,
        meta: MetaState,
        lengths: Int[Array, "batch"],
        accept: Callable[[Float[Array, "batch length hidden"]], tuple[T, Int[Array, "batch"]]],
    ) -> tuple[T, ModelState]:
        """`extend` by tokens of which only the first ones are certain (arXiv 2211.17192).

        Keys and values of rejected tokens are not stored. SSM heads are rolled back by replay:
        their recurrence runs over the accepted inputs again, from the state before them.

        Args:
          lengths: valid tokens of each row.
          accept: from the last layer's output to a result, and how many tokens of each row stay.

        Returns:
          The result, and the state after the accepted tokens.
        """
        start = state.lengths
        context = self._context(tokens, start, lengths)
        before = iter(zip(state.layers, meta, strict=True))
        x, inputs, outputs = self.embed(tokens), [], []
        for group in self._unrolled():
            states, metas = zip(*(next(before) for _ in group.blocks), strict=True)
            new = group(x, context, states, [layer.kv for layer in metas])
            inputs += [x, *(output.x for output in new[:-1])]
            outputs += new
            x = new[-1].x
        result, accepted = accept(x)
        context = context._replace(lengths=accepted)
        layers = []
        for block, layer, x, output in zip(
            self.blocks(), state.layers, inputs, outputs, strict=True
        ):
            ssm = run_replay(*nnx.split(block), x, context, layer)
            layers.append(layer.update(output._replace(ssm=ssm), start, accepted))
        return result, ModelState(tuple(layers), start + accepted)

    def _context(
        self,
        tokens: Int[Array, "batch length"],
        start: Int[Array, "batch"],
        lengths: Int[Array, "batch"],
    ) -> Context:
        """Of tokens that follow a state."""
        num_meta_tokens = self.config.num_meta_tokens
        positions = num_meta_tokens + start[:, None] + jnp.arange(tokens.shape[1])[None]
        total = num_meta_tokens + (start + lengths).max()  # without padding
        return Context(make_rope(self.config, positions, total), start, lengths)

    @jax.named_scope("embedding")
    def embed(self, tokens: Int[Array, "batch length"]) -> Float[Array, "batch length hidden"]:
        """The tokens' embeddings, in the compute dtype."""
        embedding = gather_param(self.embedding)  # not cast: gradients are summed in float32
        return constrain(embedding[tokens].astype(self.compute.dtype), "batch", "length", None)

    def embed_meta(self) -> Float[Array, "1 meta_tokens hidden"]:
        """The meta tokens, in the compute dtype."""
        meta = gather_param(self.meta_tokens, self.compute.dtype)
        return constrain(meta[None], None, "length", None)

    def flops(self, length: int, *, predicted: int) -> float:
        """FLOPs of a sequence's forward pass, independent of the implementation.

        Every token is multiplied with every kernel: 2 FLOPs per multiply-add. Heads define their
        own. Norms, rotation and softmax are left out, and so are the meta tokens, which are
        computed once.

        Args:
          length: tokens of the sequence.
          predicted: positions whose logits are computed.
        """
        kernels = sum(
            math.prod(leaf.shape)
            for path, leaf in nnx.to_flat_state(nnx.state(self, nnx.Param))
            if path[-1] == "kernel" and "lm_head" not in path
        )
        vocabulary = self.config.num_embeddings * self.config.hidden_size * predicted
        return 2.0 * (kernels * length + vocabulary) + self.head_flops(length)

    def head_flops(self, length: int) -> float:
        """Those of `flops` that are not matmuls with parameters: attention and SSM."""
        return sum(
            repeats * block.mixer.flops(length)
            for group, repeats in self.repeated_groups()
            for block in group.blocks
        )

    def logits(self, x: Float[Array, "batch length hidden"]) -> Float[Array, "batch length vocab"]:
        """Final norm and output projection, in float32."""
        return self._project(self.final_norm(x))

    def _project(
        self, x: Float[Array, "batch length hidden"]
    ) -> Float[Array, "batch length vocab"]:
        if self.quantized_output is not None:
            return self.quantized_output(x.astype(jnp.float32))
        param = self.output_projection
        project = matmul_transposed if self.config.tie_embeddings else matmul
        axes = param.get_metadata("axes")
        logits = project(x, param[...].astype(x.dtype), jnp.float32, axes)
        return constrain(logits, "batch", "length", "vocab")

    @property
    def output_projection(self) -> nnx.Param[Array]:
        """Makes logits of `last_hidden_state`: (hidden, vocab), or the embedding, transposed."""
        return self.embedding if self.config.tie_embeddings else self.lm_head.kernel

    def repeated_groups(self) -> list[tuple[LayerGroup, int]]:
        """Each group with its repeat count."""
        repeats = [group.repeats for group in _layer_groups(self.config, self.compute.scan_layers)]
        groups = (g.group if isinstance(g, ScannedLayers) else g for g in self.groups)
        return list(zip(groups, repeats, strict=True))

    def blocks(self) -> list[Block]:
        """The layers, where none are stacked."""
        return [block for group in self._unrolled() for block in group.blocks]

    def _unrolled(self) -> list[LayerGroup]:
        groups = [group for group in self.groups if isinstance(group, LayerGroup)]
        if len(groups) != len(self.groups):
            raise ValueError("a model with scan_layers has no state: use unstack_layers")
        return groups


def _meta_positions(config: HymbaConfig) -> Int[Array, "1 meta_tokens"]:
    return jnp.arange(config.num_meta_tokens)[None]


class LayerPath(NamedTuple):
    """Path of a layer's block in the model, and the layer's index where blocks are stacked."""

    path: tuple[str | int, ...]
    stack_index: int | None


def layer_paths(config: HymbaConfig, *, scan_layers: bool) -> list[LayerPath]:
    """The path of each layer's parameters, first layer first."""
    paths = []
    for i, group in enumerate(_layer_groups(config, scan_layers)):
        for repeat in range(group.repeats):
            for j in range(len(group.layers)):
                if group.repeats > 1:
                    path = LayerPath(("groups", i, "group", "blocks", j), repeat)
                else:
                    path = LayerPath(("groups", i, "blocks", j), None)
                paths.append(path)
    return paths


def stack_layers(model: Hymba) -> Hymba:
    """The same model with repeated layers' parameters stacked.

    Parameters whose layout does not change are shared, all others copied.
    """
    return _with_layout(model, scan_layers=True)


def unstack_layers(model: Hymba) -> Hymba:
    """The same model with each layer's parameters in their own arrays; shared as in `stack_layers`.

    Decoding needs this: XLA would copy a layer out of the stack each time it is used.
    """
    return _with_layout(model, scan_layers=False)


def _with_layout(model: Hymba, *, scan_layers: bool) -> Hymba:
    config = model.config
    compute = dataclasses.replace(model.compute, scan_layers=scan_layers)
    graph, shapes = nnx.split(Hymba.abstract(config, compute, model.adapter))
    held = dict(nnx.to_flat_state(nnx.state(model)))
    sources: dict[tuple[str | int, ...], list[LayerPath]] = defaultdict(list)
    for target, source in zip(
        layer_paths(config, scan_layers=scan_layers),
        layer_paths(config, scan_layers=model.compute.scan_layers),
        strict=True,
    ):
        sources[target.path].append(source)

    def find(path: tuple[Any, ...]) -> Array:
        for depth in range(len(path)):
            if places := sources.get(path[:depth]):
                arrays = [take(place, path[depth:]) for place in places]
                return arrays[0] if len(arrays) == 1 else jnp.stack(arrays)
        return held[path][...]

    def take(place: LayerPath, name: tuple[Any, ...]) -> Array:
        array = held[*place.path, *name][...]
        return array if place.stack_index is None else array[place.stack_index]

    flat = [(path, leaf.replace(find(path))) for path, leaf in nnx.to_flat_state(shapes)]
    return nnx.merge(graph, nnx.from_flat_state(flat))


def _layer_groups(config: HymbaConfig, scan_layers: bool) -> tuple[GroupSpec, ...]:
    """The groups as the model holds them: repeated ones stacked, or each by itself."""
    if scan_layers:
        return config.groups
    return tuple(
        GroupSpec(group.layers, 1) for group in config.groups for _ in range(group.repeats)
    )
