"""A trained model and its tokenizer, from a run directory."""

import dataclasses
import os
from pathlib import Path

import jax
from flax import nnx
from jax.sharding import SingleDeviceSharding

from hymba_jax.data import Tokenizer
from hymba_jax.errors import HymbaError
from hymba_jax.model import Hymba
from hymba_jax.run_config import CONFIG_FILE, RunConfig
from hymba_jax.training.checkpoint import load_params


def load(directory: str | os.PathLike[str], step: int | None = None) -> tuple[Hymba, Tokenizer]:
    """The model of a run directory, on one device, computing as it did in training.

    Args:
      step: which checkpoint; the newest if absent.

    Raises:
      HymbaError: the directory is no run, or a part of it cannot be read.
    """
    config_file = Path(directory) / CONFIG_FILE
    if not config_file.is_file():
        raise HymbaError(f"{directory}: no run directory, it has no {CONFIG_FILE}")
    config = RunConfig.from_toml(config_file)
    compute = dataclasses.replace(config.compute, remat="none")
    graph, params = nnx.split(nnx.eval_shape(lambda: Hymba(config.model, compute, nnx.Rngs(0))))
    here = SingleDeviceSharding(jax.devices()[0])
    template = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here),
        nnx.to_pure_dict(params),
    )
    return nnx.merge(graph, load_params(directory, template, step)), Tokenizer.load(directory)
