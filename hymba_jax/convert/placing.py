"""A released checkpoint straight onto a device mesh, without a directory of ours in between."""

import os
from collections import defaultdict

import jax
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh

from hymba_jax.config import ComputeConfig
from hymba_jax.convert.mapping import Index, Piece, pieces
from hymba_jax.convert.released_checkpoint import ReleasedCheckpoint
from hymba_jax.files import resolve_path
from hymba_jax.model import Hymba
from hymba_jax.training.state import abstract_model


def load_released(directory: str | os.PathLike[str], compute: ComputeConfig, mesh: Mesh) -> Hymba:
    """The model of a released checkpoint, each parameter on the devices that hold it.

    A process reads only those parts of the tensors that its own devices hold.

    Args:
      compute: how the model will compute; parameters are cast to its `param_dtype`.

    Raises:
      HymbaError: the checkpoint cannot be read, or its weights do not fit its config.json.
    """
    checkpoint = ReleasedCheckpoint(resolve_path(directory))
    graph, template = abstract_model(checkpoint.config, compute, mesh)
    params = flatten_dict(template)
    checkpoint.check()
    units = defaultdict(list)
    shapes = {path: like.shape for path, like in params.items()}
    for piece in pieces(shapes, checkpoint.config, scan_layers=compute.scan_layers):
        units[piece.path].append(piece)
    placed = {path: _place(checkpoint, units[path], like) for path, like in params.items()}
    return nnx.merge(graph, unflatten_dict(placed))


def _place(
    checkpoint: ReleasedCheckpoint, units: list[Piece], like: jax.ShapeDtypeStruct
) -> jax.Array:
    """A parameter, or a stack of its units, in the dtype and sharding of `like`."""

    def read_part(index: Index | None) -> np.ndarray:
        assert index is not None  # JAX gives one to every device that it asks for
        if units[0].unit is None:
            part = _read(checkpoint, units[0], index)
        else:
            part = np.stack([_read(checkpoint, unit, index[1:]) for unit in units[index[0]]])
        return part.astype(like.dtype)

    return jax.make_array_from_callback(like.shape, like.sharding, read_part)


def _read(checkpoint: ReleasedCheckpoint, piece: Piece, index: Index) -> np.ndarray:
    """A part of one array of ours."""
    rows, *rest = piece.layout.released_index(index)
    start, stop, _ = rows.indices(piece.stop - piece.start)
    rows = slice(piece.start + start, piece.start + stop)
    return piece.layout.to_ours(checkpoint.read(piece.name, (rows, *rest)))
