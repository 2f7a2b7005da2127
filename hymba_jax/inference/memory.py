"""The memory footprint of a sequence's state and of the meta tokens', by purpose."""

import dataclasses
import functools
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from flax import nnx

from hymba_jax.config import CacheFormat, ComputeConfig, DType, HymbaConfig
from hymba_jax.config.layer_pattern import LayerSpec
from hymba_jax.model.mixer import make_mixer
from hymba_jax.model.state import LayerState, StateFormats
from hymba_jax.parallel.memory import tree_bytes


@functools.lru_cache
def cache_bytes(
    config: HymbaConfig,
    context: int,
    dtype: DType,
    state_dtype: DType,
    kv_cache: CacheFormat = "float",
) -> Mapping[str, int]:
    """Bytes of one sequence's state, by purpose and dtype, such as "window KV, bfloat16".

    Layers are only traced, and each kind of them once.
    """
    compute = ComputeConfig(dtype=dtype, param_dtype=dtype)

    def init_state(spec: LayerSpec) -> LayerState:
        mixer = make_mixer(config, spec, compute, nnx.Rngs(0))
        return mixer.init_state(1, context, StateFormats(dtype, state_dtype, kv_cache))

    sizes: Counter[str] = Counter()
    for spec, count in Counter(config.layer_specs).items():
        layer = nnx.eval_shape(functools.partial(init_state, spec))
        for purpose, state in _by_purpose(spec, layer):
            for array in jax.tree.leaves(state):
                sizes[f"{purpose}, {array.dtype}"] += count * tree_bytes(array)
    return sizes


def meta_state_bytes(config: HymbaConfig, dtype: DType) -> Mapping[str, int]:
    """The state after the meta tokens, stored once for all sequences."""
    length = config.num_meta_tokens
    window = max(config.attention.window, length)
    attention = dataclasses.replace(config.attention, window=window)
    return cache_bytes(dataclasses.replace(config, attention=attention), length, dtype, "float32")


def _by_purpose(spec: LayerSpec, layer: LayerState) -> Iterator[tuple[str, Any]]:
    """The parts of a layer's state; SSM heads have named theirs."""
    if layer.kv is not None:
        yield f"{spec.attention} KV", layer.kv
    if layer.ssm is not None:
        for name, state in layer.ssm._asdict().items():
            yield name.replace("_", " "), state
