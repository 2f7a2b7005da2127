"""An HF checkpoint straight onto a device mesh, with no native checkpoint in between."""

import os
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh

from hymba_jax.config import ComputeConfig, HymbaConfig
from hymba_jax.convert.hf_checkpoint import HFCheckpoint
from hymba_jax.convert.mapping import HFSlice, Index, hf_slices
from hymba_jax.files import resolve_path
from hymba_jax.model import Hymba
from hymba_jax.model.abstract import abstract_model

type Read = Callable[[str, Index], np.ndarray]
"""Reads a part of an HF tensor."""


def load_hf(directory: str | os.PathLike[str], compute: ComputeConfig, mesh: Mesh) -> Hymba:
    """The model of an HF checkpoint, its parameters sharded over a mesh.

    A process reads only the shards of its own devices.

    Args:
      compute: how the model will compute; parameters are cast to its `param_dtype`.

    Raises:
      HymbaError: the checkpoint cannot be read, or its weights do not fit its config.json.
    """
    checkpoint = HFCheckpoint(resolve_path(directory))
    checkpoint.check()
    graph, abstract = abstract_model(checkpoint.config, compute, mesh)
    params = read_params(
        checkpoint.read, abstract, checkpoint.config, scan_layers=compute.scan_layers
    )
    return nnx.merge(graph, params)


def read_params(
    read: Read, abstract: dict[str, Any], config: HymbaConfig, *, scan_layers: bool
) -> dict[str, Any]:
    """A model's parameters, each shard read from HF tensors.

    Args:
      abstract: shape, dtype and sharding of every parameter.

    Raises:
      HymbaError: the HF implementation has no such architecture.
    """
    params = flatten_dict(abstract)
    shapes = {path: like.shape for path, like in params.items()}
    layers = defaultdict(list)
    for part in hf_slices(shapes, config, scan_layers=scan_layers):
        layers[part.path].append(part)
    return unflatten_dict(
        {path: _read_sharded(read, layers[path], like) for path, like in params.items()}
    )


def _read_sharded(read: Read, layers: list[HFSlice], like: jax.ShapeDtypeStruct) -> jax.Array:
    """A parameter, or the stacked ones of several layers, in the dtype and sharding of `like`."""

    def read_shard(index: Index | None) -> np.ndarray:
        assert index is not None  # never None for addressable devices
        if layers[0].stack_index is None:
            shard = _read_slice(read, layers[0], index)
        else:
            shard = np.stack([_read_slice(read, layer, index[1:]) for layer in layers[index[0]]])
        return shard.astype(like.dtype)

    return jax.make_array_from_callback(like.shape, like.sharding, read_shard)


def _read_slice(read: Read, part: HFSlice, index: Index) -> np.ndarray:
    """A part of one native array."""
    rows, *rest = part.layout.hf_index(index)
    start, stop, _ = rows.indices(part.stop - part.start)
    rows = slice(part.start + start, part.start + stop)
    return part.layout.to_native(read(part.name, (rows, *rest)))
