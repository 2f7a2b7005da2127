"""The model of a directory of a run or of a standalone model, for inference above all."""

import dataclasses
import os
import warnings

import jax
from flax import nnx

from hymba_jax.checkpoint.checkpoints import Step, load_params, resolve_step
from hymba_jax.checkpoint.model_file import read_model_directory, read_trainable
from hymba_jax.config import ComputeConfig, DType, HymbaConfig
from hymba_jax.model import Hymba, merge_adapters
from hymba_jax.model.abstract import Params, abstract_model
from hymba_jax.parallel.memory import check_fits, tree_bytes
from hymba_jax.parallel.mesh import AnyMesh, make_mesh


def load_model(
    directory: str | os.PathLike[str], *, dtype: DType | None = None, step: Step | None = None
) -> Hymba:
    """The model on one device of this process, its layers stacked as the directory has them.

    An adapter is merged.

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
    devices = jax.local_devices()[:1]
    mesh = make_mesh(devices)
    graph, template = abstract_model(config, compute, mesh)
    check_fits(
        f"{directory}: its parameters in {dtype}",
        tree_bytes(template),
        devices,
        "use a smaller dtype, or another device",
    )
    return nnx.merge(graph, load_merged_params(directory, config, compute, mesh, found))


def load_merged_params(
    directory: str | os.PathLike[str],
    config: HymbaConfig,
    compute: ComputeConfig,
    mesh: AnyMesh,
    step: int | None = None,
) -> Params:
    """The parameters of a directory; if it is of a run with an adapter, this is merged into them.

    Args:
      config, compute: of the directory; parameters are cast to `compute.param_dtype`.

    Raises:
      HymbaError: they cannot be read.
    """
    adapter = read_trainable(directory).adapter
    graph, like = abstract_model(config, compute, mesh, adapter)
    params = load_params(directory, like, step)
    return merged_params(graph, params) if adapter else params


def merged_params(graph: nnx.GraphDef[Hymba], params: Params) -> Params:
    """The parameters of a model whose adapters are merged; `params` are donated."""

    def merge(params: Params) -> Params:
        merged: Params = nnx.to_pure_dict(nnx.state(merge_adapters(nnx.merge(graph, params))))
        return merged

    with warnings.catch_warnings():
        # The adapters themselves have no place in the result.
        warnings.filterwarnings("ignore", "Some donated buffers were not usable")
        return jax.jit(merge, donate_argnums=0)(params)
