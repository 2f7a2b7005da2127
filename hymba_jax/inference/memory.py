"""The memory footprint of a sequence's state and of the meta tokens', by purpose."""

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass

from flax import nnx

from hymba_jax.config import ComputeConfig, DType, HymbaConfig
from hymba_jax.config.layer_pattern import LayerSpec
from hymba_jax.model.mixer import make_mixer
from hymba_jax.model.state import LayerState
from hymba_jax.parallel.memory import tree_bytes


@dataclass(frozen=True)
class CacheBytes:
    """Bytes of one sequence's cache, by purpose."""

    global_kv: int
    window_kv: int
    conv_state: int
    ssm_states: int

    @property
    def total(self) -> int:
        return sum(dataclasses.astuple(self))


@functools.lru_cache
def cache_bytes(config: HymbaConfig, context: int, dtype: DType, state_dtype: DType) -> CacheBytes:
    """The state of one sequence; layers are only traced, and each kind of them once."""
    compute = ComputeConfig(dtype=dtype, param_dtype=dtype)

    def init_state(spec: LayerSpec) -> LayerState:
        mixer = make_mixer(config, spec, compute, nnx.Rngs(0))
        return mixer.init_state(1, context, dtype, state_dtype)

    kinds = set(config.layer_specs)
    states = {spec: nnx.eval_shape(functools.partial(init_state, spec)) for spec in kinds}
    return _by_use(config, [states[spec] for spec in config.layer_specs])


def meta_state_bytes(config: HymbaConfig, dtype: DType) -> CacheBytes:
    """The state after the meta tokens, stored once for all sequences."""
    length = config.num_meta_tokens
    window = max(config.attention.window, length)
    attention = dataclasses.replace(config.attention, window=window)
    return cache_bytes(dataclasses.replace(config, attention=attention), length, dtype, "float32")


def _by_use(config: HymbaConfig, layers: Sequence[LayerState]) -> CacheBytes:
    kv = {"global": 0, "window": 0}
    for spec, layer in zip(config.layer_specs, layers, strict=True):
        if spec.attention is not None:
            kv[spec.attention] += tree_bytes(layer.kv)
    return CacheBytes(
        global_kv=kv["global"],
        window_kv=kv["window"],
        conv_state=sum(tree_bytes(layer.ssm.conv_state) for layer in layers if layer.ssm),
        ssm_states=sum(tree_bytes(layer.ssm.ssm_state) for layer in layers if layer.ssm),
    )
