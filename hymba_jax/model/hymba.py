"""The whole model: meta tokens, layers, logits."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from hymba_jax.config import ComputeConfig, HymbaConfig
from hymba_jax.layer_pattern import Segment
from hymba_jax.model.block import Stack, Unit
from hymba_jax.model.layers import INIT_STD, Linear, rms_norm
from hymba_jax.model.rope import Rope, make_rope
from hymba_jax.ops.matmul import matmul
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
            normal(rngs.params(), (config.vocab_size, config.hidden_size), compute.param_dtype),
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
                config.hidden_size, config.vocab_size, ("hidden", "vocab"), compute, rngs
            )

    def __call__(
        self, tokens: Int[Array, "batch length"], *, text_length: int | Int[Array, ""] | None = None
    ) -> Float[Array, "batch length vocab"]:
        """Logits in float32 for the token after each token.

        Args:
          text_length: tokens of the text, where padding stands behind it; nothing looks ahead, so
            only a rotation that follows the length ("dynamic_ntk") depends on it.
        """
        x, rope = self.embed(tokens), self.rope(tokens.shape[1], text_length)
        for segment in self.segments:
            x, _ = segment(x, rope)
        return self.logits(x)

    def hidden_states(
        self, tokens: Int[Array, "batch length"]
    ) -> list[Float[Array, "batch positions hidden"]]:
        """The first layer's input and each layer's output, before the final norm."""
        x, rope = self.embed(tokens), self.rope(tokens.shape[1])
        states = [x]
        for segment in self.segments:
            x, outputs = segment(x, rope, keep_outputs=True)
            states += outputs
        return states

    def rope(self, length: int, text_length: int | Int[Array, ""] | None = None) -> Rope:
        """The rotation of every position, meta tokens first."""
        meta = self.config.num_meta_tokens
        total = meta + (length if text_length is None else text_length)
        return make_rope(self.config, jnp.arange(meta + length), total)

    def embed(self, tokens: Int[Array, "batch length"]) -> Float[Array, "batch positions hidden"]:
        """The meta tokens, then the tokens' embeddings, in the compute dtype."""
        x = self.embedding[...][tokens].astype(self.compute.dtype)  # gradients add up unrounded
        if not self.config.num_meta_tokens:
            return x
        meta = self.meta_tokens[...].astype(self.compute.dtype)
        meta = jnp.broadcast_to(meta[None], (x.shape[0], *meta.shape))
        return jnp.concatenate((meta, x), axis=1)

    def logits(
        self, x: Float[Array, "batch positions hidden"]
    ) -> Float[Array, "batch length vocab"]:
        """Norm, meta tokens dropped, projection on the vocabulary in float32."""
        x = self.final_norm(x[:, self.config.num_meta_tokens :])
        if self.config.tie_embeddings:
            kernel = self.embedding[...].astype(x.dtype).T
        else:
            kernel = self.lm_head.kernel[...].astype(x.dtype)
        return matmul(x, kernel, jnp.float32)


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


def _held_segments(config: HymbaConfig, scan_layers: bool) -> tuple[Segment, ...]:
    """The segments as the model holds them: repeated ones rolled, or each unit by itself."""
    if scan_layers:
        return config.segments
    return tuple(
        Segment(segment.unit, 1) for segment in config.segments for _ in range(segment.repeats)
    )
