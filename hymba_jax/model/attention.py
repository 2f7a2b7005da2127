"""The attention heads of a layer (paper, sections 2.1 to 2.3)."""

from collections.abc import Callable

import jax.numpy as jnp
from flax import nnx

from hymba_jax.config import ComputeConfig, HymbaConfig
from hymba_jax.layer_pattern import LayerSpec
from hymba_jax.model.cache import KeyValue, Past
from hymba_jax.model.layers import Linear, RMSNorm
from hymba_jax.model.rope import Rope
from hymba_jax.ops.attention import attention, attention_step
from hymba_jax.ops.attention.reference import attention_mask, attention_weights
from hymba_jax.types import Array, Float


class Attention(nnx.Module):
    """Grouped-query attention, global or sliding, with its own or its neighbour's keys and values.

    It has no output projection: the mixer's serves both kinds of head.
    """

    def __init__(
        self, config: HymbaConfig, spec: LayerSpec, compute: ComputeConfig, rngs: nnx.Rngs
    ):
        heads, kv_heads = config.attention.num_heads, config.attention.num_kv_heads
        self.window = config.attention.window if spec.attention == "window" else None
        self.num_meta_tokens = config.num_meta_tokens
        self.reuses_kv = spec.reuses_kv
        self.head_dim, self.value_dim = config.head_dim, config.value_dim
        self.query_proj = Linear(
            config.hidden_size, heads * config.head_dim, ("hidden", "heads"), compute, rngs
        )
        self.query_norm = _qk_norm(config, heads, compute)
        if not spec.reuses_kv:
            self.key_proj = Linear(
                config.hidden_size, kv_heads * config.head_dim, ("hidden", "heads"), compute, rngs
            )
            self.value_proj = Linear(
                config.hidden_size, kv_heads * config.value_dim, ("hidden", "heads"), compute, rngs
            )
            self.key_norm = _qk_norm(config, kv_heads, compute)

    def __call__(
        self,
        x: Float[Array, "batch length hidden"],
        rope: Rope,
        kv: KeyValue | None,
        past: Past | None = None,
    ) -> tuple[Float[Array, "batch length attention_channels"], KeyValue]:
        """The heads' outputs side by side, and the keys and values of these positions.

        Args:
          kv: of the layer before, for a layer that reuses them.
          past: what stands before x; nothing if absent, so that x begins with the meta tokens.
        """
        query, kv = self.query(x, rope), self.key_value(x, rope, kv)
        return self.attend(query, kv, past).reshape(*x.shape[:2], -1), kv

    def attend(
        self,
        query: Float[Array, "batch length heads head_dim"],
        kv: KeyValue,
        past: Past | None,
    ) -> Float[Array, "batch length heads value_dim"]:
        if past is not None and past.cache is not None and query.shape[1] == 1:
            output = attention_step(
                query[:, 0],
                kv.key[:, 0],
                kv.value[:, 0],
                past_key=past.cache.key,
                past_value=past.cache.value,
                past_length=past.length,
                meta_key=past.meta.key[0],
                meta_value=past.meta.value[0],
            )
            return output[:, None]
        everything = kv if past is None else past.followed_by(kv)
        return attention(
            query,
            everything.key,
            everything.value,
            window=self.window,
            num_meta_tokens=self.num_meta_tokens,
            first_key=None if past is None else past.first_key(),
        )

    def query(
        self, x: Float[Array, "batch length hidden"], rope: Rope
    ) -> Float[Array, "batch length heads head_dim"]:
        return rope.rotate(self.query_norm(_split_heads(self.query_proj(x), self.head_dim)))

    def key_value(
        self, x: Float[Array, "batch length hidden"], rope: Rope, kv: KeyValue | None
    ) -> KeyValue:
        if self.reuses_kv:
            if kv is None:
                raise ValueError("this layer reuses keys and values, and was given none")
            return kv
        key = rope.rotate(self.key_norm(_split_heads(self.key_proj(x), self.head_dim)))
        return KeyValue(key, _split_heads(self.value_proj(x), self.value_dim))

    def weights(
        self, x: Float[Array, "batch length hidden"], rope: Rope, kv: KeyValue | None
    ) -> Float[Array, "batch heads length length"]:
        """The attention maps, for looking at; the forward pass never holds them."""
        positions = jnp.arange(x.shape[1])
        mask = attention_mask(
            positions[None], positions, window=self.window, num_meta_tokens=self.num_meta_tokens
        )
        maps = attention_weights(self.query(x, rope), self.key_value(x, rope, kv).key, mask)
        return maps.reshape(maps.shape[0], -1, *maps.shape[3:])


def _split_heads(
    x: Float[Array, "batch length width"], head_dim: int
) -> Float[Array, "batch length heads head_dim"]:
    return x.reshape(*x.shape[:2], -1, head_dim)


def _identity(x: Array) -> Array:
    return x


def _qk_norm(config: HymbaConfig, heads: int, compute: ComputeConfig) -> Callable[[Array], Array]:
    match config.attention.qk_norm:
        case "none":
            return _identity
        case "rms":
            shape: tuple[int, ...] = (config.head_dim,)
            axes: tuple[str, ...] = ("head_dim",)
        case "perhead-rms":
            shape, axes = (heads, config.head_dim), ("heads", "head_dim")
    return RMSNorm(shape, axes, config.norm_eps, compute.param_dtype)
