"""The attention heads of a layer (paper, sections 2.1 to 2.3)."""

from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from hymba_jax.config import CacheFormat, ComputeConfig, HymbaConfig
from hymba_jax.config.layer_pattern import LayerSpec
from hymba_jax.model.context import Context
from hymba_jax.model.kv_cache import AttendedKV, KeyValue, KVCache
from hymba_jax.model.layers import Linear, RMSNorm
from hymba_jax.model.rope import Rope
from hymba_jax.ops.attention import attention, attention_step
from hymba_jax.ops.attention.reference import attention_mask, attention_weights
from hymba_jax.ops.int8_rows import Int8Rows
from hymba_jax.types import Array, Float


class Attention(nnx.Module):
    """Grouped-query attention, global or sliding, with its own or its neighbour's keys and values.

    It has no output projection: the mixer's serves both kinds of head.
    """

    INPUT_PROJECTIONS: ClassVar[tuple[str, ...]] = ("query_proj", "key_proj", "value_proj")

    def __init__(
        self, config: HymbaConfig, spec: LayerSpec, compute: ComputeConfig, rngs: nnx.Rngs
    ):
        heads, kv_heads = config.attention.num_heads, config.attention.num_kv_heads
        self.window = config.attention.window if spec.attention == "window" else None
        self.num_heads, self.num_kv_heads = heads, kv_heads
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

    @jax.named_scope("attention")
    def __call__(
        self,
        x: Float[Array, "batch length hidden"],
        context: Context,
        cache: KVCache | None = None,
        meta: KVCache | None = None,
        shared: AttendedKV | None = None,
    ) -> tuple[Float[Array, "batch length attention_channels"], AttendedKV]:
        """The concatenated heads' outputs, and the keys and values that they attended to.

        Args:
          cache: of the tokens before x; None where there are none.
          meta: of the meta tokens; None where x are the meta tokens.
          shared: keys and values of the layer before, for a layer that reuses them.
        """
        query = self.query(x, context.rope)
        if not self.reuses_kv:
            shared = AttendedKV.of(self.key_value(x, context.rope), cache, meta)
        elif shared is None:
            raise ValueError("this layer reuses keys and values, and was given none")
        return self.attend(query, shared, context).reshape(*x.shape[:2], -1), shared

    def attend(
        self, query: Float[Array, "batch length heads head_dim"], kv: AttendedKV, context: Context
    ) -> Float[Array, "batch length heads value_dim"]:
        new = kv.new.astype(query.dtype)
        if kv.meta is None:
            return attention(query, *new, window=None)  # meta tokens are not windowed
        if kv.cache is not None and context.start is not None and query.shape[1] == 1:
            arguments = kv.step_arguments(context.start, query.dtype)
            return attention_step(query[:, 0], **arguments)[:, None]
        tokens, kv_start = kv.tokens(context.start, query.dtype)
        meta_key, meta_value = (a[0].swapaxes(0, 1) for a in kv.meta)
        return attention(
            query,
            *tokens,
            meta_key=meta_key,
            meta_value=meta_value,
            window=self.window,
            kv_start=kv_start,
            segment_ids=context.segment_ids,
        )

    def init_state(
        self, batch: int, max_length: int, dtype: DTypeLike, kv_cache: CacheFormat
    ) -> KVCache | None:
        """An empty cache for up to `max_length` tokens a sequence; None if the layer needs none."""
        if self.reuses_kv:
            return None
        slots = max_length if self.window is None else min(self.window, max_length)
        shape = (batch, self.num_kv_heads, slots)
        zeros = Int8Rows.zeros if kv_cache == "int8" else jnp.zeros
        return KVCache(
            zeros((*shape, self.head_dim), dtype), zeros((*shape, self.value_dim), dtype)
        )

    def flops(self, length: int) -> float:
        """FLOPs of one sequence's scores and weighted sums, each query with its unmasked keys."""
        seen = np.arange(1, length + 1)
        if self.window is not None:
            seen = np.minimum(seen, self.window + 1)
        pairs = float(seen.sum()) + self.num_meta_tokens * length
        return 2 * self.num_heads * (self.head_dim + self.value_dim) * pairs

    def query(
        self, x: Float[Array, "batch length hidden"], rope: Rope
    ) -> Float[Array, "batch length heads head_dim"]:
        return rope.rotate(self.query_norm(split_heads(self.query_proj(x), self.head_dim)))

    def key_value(self, x: Float[Array, "batch length hidden"], rope: Rope) -> KeyValue:
        key = rope.rotate(self.key_norm(split_heads(self.key_proj(x), self.head_dim)))
        return KeyValue(key, split_heads(self.value_proj(x), self.value_dim))

    def weights(
        self, x: Float[Array, "batch length hidden"], rope: Rope, kv: KeyValue | None = None
    ) -> Float[Array, "batch heads length length"]:
        """The attention maps of whole sequences, for inspection; the forward pass does not store
        them.

        Args:
          x: begins with the meta tokens.
          kv: of the layer before, for a layer that reuses them.
        """
        positions = jnp.arange(x.shape[1])
        mask = attention_mask(
            positions[None], positions, window=self.window, num_meta_tokens=self.num_meta_tokens
        )
        key = (kv or self.key_value(x, rope)).key
        maps = attention_weights(self.query(x, rope), key, mask)
        return maps.reshape(maps.shape[0], -1, *maps.shape[3:])


def split_heads(
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
