"""A trained model and its tokenizer, from a run directory."""

import dataclasses
import os
from pathlib import Path

import jax
from flax import nnx

from hymba_jax.data import Tokenizer
from hymba_jax.errors import HymbaError
from hymba_jax.model import Hymba
from hymba_jax.run_config import CONFIG_FILE, RunConfig
from hymba_jax.sharding import make_mesh
from hymba_jax.training.checkpoint import load_params
from hymba_jax.training.state import describe_model


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
    graph, template = describe_model(config.model, compute, make_mesh(jax.devices()[:1]))
    return nnx.merge(graph, load_params(directory, template, step)), Tokenizer.load(directory)
