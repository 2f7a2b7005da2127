"""The whole model: meta tokens, layers, logits."""

import dataclasses
from collections import defaultdict
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from hymba_jax.config import ComputeConfig, HymbaConfig
from hymba_jax.layer_pattern import Segment
from hymba_jax.model.block import Stack, Unit
from hymba_jax.model.cache import Cache, Prefix, empty_prefix, layer_pasts
from hymba_jax.model.layers import INIT_STD, Linear, rms_norm
from hymba_jax.model.mixer import Context
from hymba_jax.model.rope import make_rope
from hymba_jax.ops.matmul import matmul, matmul_transposed
from hymba_jax.sharding import constrain, in_use
from hymba_jax.types import Array, Float, Int


class Hymba(nnx.Module):
    """A language model of hybrid-head layers behind learned meta tokens (paper, Fig. 2).

    Each layer's parameters are drawn from its own key, so they are the same whether repeated
    layers are scanned or not.
    """

    def __init__(self, config: HymbaConfig, compute: ComputeConfig, rngs: nnx.Rngs):
        self.config = config
        self.compute = compute
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
        self.segments: nnx.List[Stack | Unit] = nnx.List()
        start = 0
        for segment in _held_segments(config, compute.scan_layers):
            keys = layer_keys[start : start + segment.num_layers]
            if segment.repeats > 1:
                keys = keys.reshape(segment.repeats, len(segment.unit))
                self.segments.append(Stack(config, segment.unit, compute, keys))
            else:
                self.segments.append(Unit(config, segment.unit, compute, keys))
            start += segment.num_layers
        self.final_norm = rms_norm(config.hidden_size, "hidden", config.norm_eps, compute)
        if not config.tie_embeddings:
            self.lm_head = Linear(
                config.hidden_size, config.num_embeddings, ("hidden", "vocab"), compute, rngs
            )

    def __call__(self, tokens: Int[Array, "batch length"]) -> Float[Array, "batch length vocab"]:
        """Logits in float32 for the token after each token."""
        x = self._run(tokens, keep_all=False)[-1]
        return self.logits(x[:, self.config.num_meta_tokens :])

    def hidden_states(
        self, tokens: Int[Array, "batch length"]
    ) -> list[Float[Array, "batch positions hidden"]]:
        """The first layer's input and each layer's output, before the final norm."""
        return self._run(tokens, keep_all=True)

    def _run(
        self, tokens: Int[Array, "batch length"], *, keep_all: bool
    ) -> list[Float[Array, "batch positions hidden"]]:
        x = self.embed_all(tokens)
        context = Context(make_rope(self.config, jnp.arange(x.shape[1])[None], x.shape[1]))
        states = [x]
        for segment in self.segments:
            if isinstance(segment, Stack):
                states += segment(states[-1], context, keep_all=keep_all)
            else:
                states += segment(states[-1], context)
        return states

    def prefix(self) -> Prefix:
        """What the meta tokens leave behind, which every text begins with."""
        length = self.config.num_meta_tokens
        empty = empty_prefix(self.config, self.compute.dtype)
        if not length:
            return empty
        positions, outputs = jnp.arange(length)[None], []
        x = self.embed_meta(positions)
        context = Context(make_rope(self.config, positions, length))
        for unit in self.units():
            outputs += unit.after(x, context)
            x = outputs[-1].x
        start, counts = jnp.zeros(1, jnp.int32), jnp.full(1, length)
        return tuple(
            layer.after(output.kv, output.ssm, start, counts)
            for layer, output in zip(empty, outputs, strict=True)
        )

    def extend(
        self,
        tokens: Int[Array, "batch length"],
        cache: Cache,
        prefix: Prefix,
        lengths: Int[Array, "batch"],
        *,
        is_start: bool = False,
    ) -> tuple[Float[Array, "batch length hidden"], Cache]:
        """The last layer's output for tokens that go on from a cache, and the cache after them.

        Equal to the full forward pass at those positions, however a text is cut into pieces.

        Args:
          lengths: tokens of each row that count; those after them leave no trace.
          is_start: no row has tokens in the cache yet, which saves looking for them.
        """
        start = cache.lengths
        positions = self.config.num_meta_tokens + start[:, None] + jnp.arange(tokens.shape[1])[None]
        total = self.config.num_meta_tokens + (start + lengths).max()  # padding is no text
        context = Context(make_rope(self.config, positions, total), lengths)
        pasts = iter(layer_pasts(cache, prefix, is_start=is_start))
        caches = iter(cache.layers)
        x, layers = self.embed(tokens), []
        for unit in self.units():
            outputs = unit.after(x, context, [next(pasts) for _ in unit.blocks])
            x, before = outputs[-1].x, [next(caches) for _ in outputs]
            # Written after the last reading, so that it happens in place.
            x, kv_caches = jax.lax.optimization_barrier((x, [cache.kv for cache in before]))
            layers += [
                cache._replace(kv=kv).after(output.kv, output.ssm, start, lengths)
                for cache, kv, output in zip(before, kv_caches, outputs, strict=True)
            ]
        return x, Cache(tuple(layers), start + lengths)

    def embed(self, tokens: Int[Array, "batch length"]) -> Float[Array, "batch length hidden"]:
        """The tokens' embeddings, in the compute dtype."""
        embedding = in_use(self.embedding)  # not rounded, so that its gradients add up unrounded
        return embedding[tokens].astype(self.compute.dtype)

    def embed_meta(
        self, positions: Int[Array, "batch length"]
    ) -> Float[Array, "batch length hidden"]:
        """The meta tokens at these positions in the compute dtype, zeros at those after them."""
        meta = in_use(self.meta_tokens, self.compute.dtype)
        return meta.at[positions].get(mode="fill", fill_value=0)

    def embed_all(
        self, tokens: Int[Array, "batch length"]
    ) -> Float[Array, "batch positions hidden"]:
        """The meta tokens and the text behind them.

        Every position is looked up in both tables. Two lookups one after the other would be split
        over devices in other parts than the whole, and have to be sent between them.
        """
        meta = self.config.num_meta_tokens
        x = self.embed(jnp.pad(tokens, ((0, 0), (meta, 0))))
        if meta:
            positions = jnp.broadcast_to(jnp.arange(x.shape[1])[None], x.shape[:2])
            x = jnp.where(positions[:, :, None] < meta, self.embed_meta(positions), x)
        return constrain(x, "batch", "length", None)

    def logits(self, x: Float[Array, "batch length hidden"]) -> Float[Array, "batch length vocab"]:
        """Norm and projection on the vocabulary, in float32."""
        x = self.final_norm(x)
        if self.config.tie_embeddings:
            param, product = self.embedding, matmul_transposed
        else:
            param, product = self.lm_head.kernel, matmul
        axes = param.get_metadata("axes")
        logits = product(x, param[...].astype(x.dtype), jnp.float32, axes)
        return constrain(logits, "batch", "length", "vocab")

    def units(self) -> list[Unit]:
        """The layers in their units, where none are stacked."""
        units = [segment for segment in self.segments if isinstance(segment, Unit)]
        if len(units) != len(self.segments):
            raise ValueError("a model that scans its layers keeps no cache: see scan_layers")
        return units


class LayerPlace(NamedTuple):
    """Where a layer's parameters stand: the path of its block, and its place if stacked."""

    block: tuple[str | int, ...]
    unit: int | None


def layer_places(config: HymbaConfig, *, scan_layers: bool) -> list[LayerPlace]:
    """The place of each layer among the parameters, first layer first."""
    places = []
    for i, segment in enumerate(_held_segments(config, scan_layers)):
        for unit in range(segment.repeats):
            for j in range(len(segment.unit)):
                if segment.repeats > 1:
                    place = LayerPlace(("segments", i, "units", "blocks", j), unit)
                else:
                    place = LayerPlace(("segments", i, "blocks", j), None)
                places.append(place)
    return places


def arrange_layers(model: Hymba, *, scan_layers: bool) -> Hymba:
    """The same model with repeated layers' parameters stacked, or each layer's in its own arrays.

    A cache needs them apart: XLA would copy a layer out of the stack each time it is used. What
    stands as it did before is shared, all else copied.
    """
    config = model.config
    compute = dataclasses.replace(model.compute, scan_layers=scan_layers)
    graph, arranged = nnx.split(nnx.eval_shape(lambda: Hymba(config, compute, nnx.Rngs(0))))
    held = dict(nnx.to_flat_state(nnx.state(model)))
    sources: dict[tuple[str | int, ...], list[LayerPlace]] = defaultdict(list)
    for ours, theirs in zip(
        layer_places(config, scan_layers=scan_layers),
        layer_places(config, scan_layers=model.compute.scan_layers),
        strict=True,
    ):
        sources[ours.block].append(theirs)

    def find(path: tuple[Any, ...]) -> Array:
        for depth in range(len(path)):
            if places := sources.get(path[:depth]):
                arrays = [take(place, path[depth:]) for place in places]
                return arrays[0] if len(arrays) == 1 else jnp.stack(arrays)
        return held[path][...]

    def take(place: LayerPlace, name: tuple[Any, ...]) -> Array:
        array = held[*place.block, *name][...]
        return array if place.unit is None else array[place.unit]

    flat = [(path, leaf.replace(find(path))) for path, leaf in nnx.to_flat_state(arranged)]
    return nnx.merge(graph, nnx.from_flat_state(flat))


def _held_segments(config: HymbaConfig, scan_layers: bool) -> tuple[Segment, ...]:
    """The segments as the model holds them: repeated ones rolled, or each unit by itself."""
    if scan_layers:
        return config.segments
    return tuple(
        Segment(segment.unit, 1) for segment in config.segments for _ in range(segment.repeats)
    )
