"""The one table from logical axes to the axes of a device mesh.

Models name logical axes (the metadata `axes` of each parameter) and nothing else. The mesh has one
axis, `data`: batches are split over it, and so is every parameter with its optimizer state, along
`hidden` (fully sharded data parallelism, arXiv 2004.13336). An array whose axis the mesh does not
divide is replicated.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

MESH_AXES: dict[str, str] = {"batch": "data", "hidden": "data"}


def make_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of these devices, or of all there are."""
    return Mesh(np.asarray(jax.devices() if devices is None else devices), ("data",))


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows of a batch spread over the devices."""
    return NamedSharding(mesh, PartitionSpec(MESH_AXES["batch"]))


def state_shardings(state: Any, mesh: Mesh) -> Any:
    """A sharding for each parameter, or each optimizer moment, of a tree of them.

    Args:
      state: any tree; NNX variables are placed by their `axes`, all else is replicated.
    """

    def place(leaf: Any) -> NamedSharding:
        if not isinstance(leaf, nnx.Variable):
            return replicated(mesh)
        axes = leaf.get_metadata("axes")
        shape = leaf.get_raw_value().shape
        stacked = len(shape) - len(axes)  # stacked layers stand in front
        names = [None] * stacked + [MESH_AXES.get(axis) for axis in axes]
        fits = [
            name if name and size % mesh.shape[name] == 0 else None
            for name, size in zip(names, shape, strict=True)
        ]
        return NamedSharding(mesh, PartitionSpec(*fits))

    return jax.tree.map(place, state, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
