"""A model without its values: shapes, dtypes and shardings of its parameters."""

from typing import Any

import jax
from flax import nnx
from jax.sharding import NamedSharding

from hymba_jax.config import ComputeConfig, HymbaConfig
from hymba_jax.model.hymba import Hymba
from hymba_jax.model.sharding import state_shardings
from hymba_jax.parallel.mesh import AnyMesh

type Params = dict[Any, Any]
"""Nested dictionaries of arrays: NNX variables without their wrapping, which costs time a step."""


def abstract_model(
    config: HymbaConfig, compute: ComputeConfig, mesh: AnyMesh
) -> tuple[nnx.GraphDef[Hymba], Params]:
    """The model without its parameters, and their shapes, dtypes and shardings."""
    graph, variables = nnx.split(Hymba.abstract(config, compute))
    shardings = nnx.to_pure_dict(state_shardings(variables, config, mesh))
    return graph, jax.tree.map(placed, nnx.to_pure_dict(variables), shardings)


def placed(array: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)
