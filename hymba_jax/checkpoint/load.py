"""A model for inference, from the directory of a run or of a standalone model."""

import dataclasses
import os

import jax
from flax import nnx

from hymba_jax.checkpoint.checkpoints import Step, load_params, resolve_step
from hymba_jax.checkpoint.model_file import read_model_directory
from hymba_jax.config import DType
from hymba_jax.model import Hymba
from hymba_jax.model.abstract import abstract_model
from hymba_jax.parallel.memory import check_fits, tree_bytes
from hymba_jax.parallel.mesh import make_mesh


def load_model(
    directory: str | os.PathLike[str], *, dtype: DType | None = None, step: Step | None = None
) -> Hymba:
    """The model on one device, its layers stacked as the directory has them.

    Args:
      dtype: of parameters and activations; by default that of the training, but float32 on CPUs,
        where it is fastest.
      step: which checkpoint of a run, or "best", of the lowest validation loss; the newest if
        absent.

    Raises:
      HymbaError: the directory holds no model, or it does not fit into the device's memory.
    """
    found = resolve_step(directory, step)
    config, compute = read_model_directory(directory, found)
    if dtype is None:
        dtype = "float32" if jax.default_backend() == "cpu" else compute.dtype
    compute = dataclasses.replace(compute, remat="none", dtype=dtype, param_dtype=dtype)
    devices = jax.devices()[:1]
    graph, template = abstract_model(config, compute, make_mesh(devices))
    check_fits(
        f"{directory}: its parameters in {dtype}",
        tree_bytes(template),
        devices,
        "use a smaller dtype, or another device",
    )
    return nnx.merge(graph, load_params(directory, template, found))
