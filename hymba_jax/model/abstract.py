"""A model without its values: shapes, dtypes and shardings of its parameters."""

import dataclasses
from typing import Any

import jax
from flax import nnx
from jax.sharding import NamedSharding

from hymba_jax.config import ComputeConfig, HymbaConfig
from hymba_jax.config.adapter import NO_ADAPTER, AdapterConfig
from hymba_jax.model.hymba import Hymba, layer_paths
from hymba_jax.model.sharding import state_shardings
from hymba_jax.parallel.mesh import AnyMesh

type ParamPath = tuple[Any, ...]
"""Path of a parameter in the model: names and indices."""

type Params = dict[Any, Any]
"""Nested dictionaries of arrays: NNX's wrappers would cost time in every step."""


def abstract_model(
    config: HymbaConfig,
    compute: ComputeConfig,
    mesh: AnyMesh,
    adapter: AdapterConfig = NO_ADAPTER,
) -> tuple[nnx.GraphDef[Hymba], Params]:
    """The model without its parameters, and their shapes, dtypes and shardings."""
    graph, variables = nnx.split(Hymba.abstract(config, compute, adapter))
    shardings = nnx.to_pure_dict(state_shardings(variables, config, mesh))
    return graph, jax.tree.map(with_sharding, nnx.to_pure_dict(variables), shardings)


def with_sharding(array: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)


def abstract_params(
    config: HymbaConfig, compute: ComputeConfig, adapter: AdapterConfig = NO_ADAPTER
) -> dict[ParamPath, jax.ShapeDtypeStruct]:
    """Shape and dtype of each of a model's parameters, by path."""
    # Stacked layers are traced once: half the time.
    stacked = Hymba.abstract(config, dataclasses.replace(compute, scan_layers=True), adapter)
    params = {
        path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        for path, leaf in nnx.to_flat_state(nnx.state(stacked))
    }
    return params if compute.scan_layers else _unstacked(params, config)


def _unstacked(
    params: dict[ParamPath, jax.ShapeDtypeStruct], config: HymbaConfig
) -> dict[ParamPath, jax.ShapeDtypeStruct]:
    """The parameters of each layer, from those of a model that stacks them."""
    unstacked = {path: like for path, like in params.items() if path[0] != "groups"}
    for target, source in zip(
        layer_paths(config, scan_layers=False),
        layer_paths(config, scan_layers=True),
        strict=True,
    ):
        depth = len(source.path)
        for path, like in params.items():
            if path[:depth] == source.path:
                shape = like.shape if source.stack_index is None else like.shape[1:]
                name = (*target.path, *path[depth:])
                unstacked[name] = jax.ShapeDtypeStruct(shape, like.dtype)
    return unstacked


def param_shapes(
    config: HymbaConfig, *, scan_layers: bool, adapter: AdapterConfig = NO_ADAPTER
) -> dict[ParamPath, tuple[int, ...]]:
    """The shape of each of a model's parameters, by path."""
    params = abstract_params(config, ComputeConfig(scan_layers=scan_layers), adapter)
    return {path: like.shape for path, like in params.items()}
