"""The memory footprint of a sequence's state and of the meta tokens', by what it is for."""

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any

import jax
from flax import nnx

from hymba_jax.config import ComputeConfig, DType, HymbaConfig
from hymba_jax.model import Hymba
from hymba_jax.parallel.memory import tree_bytes


@dataclass(frozen=True)
class CacheBytes:
    """Bytes of one sequence's cache, by what they are for."""

    global_kv: int
    window_kv: int
    conv_inputs: int
    ssm_states: int

    @property
    def total(self) -> int:
        return sum(dataclasses.astuple(self))


@functools.lru_cache
def cache_bytes(config: HymbaConfig, context: int, dtype: DType, state_dtype: DType) -> CacheBytes:
    """The state of one sequence."""
    model = _abstract_model(config, dtype)
    return _by_use(config, jax.eval_shape(lambda: model.init_state(1, context, state_dtype)).layers)


@functools.lru_cache
def meta_state_bytes(config: HymbaConfig, dtype: DType) -> CacheBytes:
    """The state after the meta tokens, held once for all sequences."""
    graph, params = nnx.split(_abstract_model(config, dtype))
    return _by_use(
        config, jax.eval_shape(lambda params: nnx.merge(graph, params).meta_state(), params)
    )


def _abstract_model(config: HymbaConfig, dtype: DType) -> Hymba:
    compute = ComputeConfig(dtype=dtype, param_dtype=dtype, scan_layers=False)
    return nnx.eval_shape(lambda: Hymba(config, compute, nnx.Rngs(0)))


def _by_use(config: HymbaConfig, layers: Any) -> CacheBytes:
    kv = {"global": 0, "window": 0}
    for spec, layer in zip(config.layer_specs, layers, strict=True):
        if spec.attention is not None:
            kv[spec.attention] += tree_bytes(layer.kv)
    return CacheBytes(
        global_kv=kv["global"],
        window_kv=kv["window"],
        conv_inputs=sum(tree_bytes(layer.ssm.conv_inputs) for layer in layers if layer.ssm),
        ssm_states=sum(tree_bytes(layer.ssm.ssm_state) for layer in layers if layer.ssm),
    )
