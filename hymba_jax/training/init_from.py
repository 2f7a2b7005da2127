"""A run that starts from the parameters of another run or model."""

import dataclasses
import json
from typing import Any

import jax
import optax
from flax import nnx
from jax.sharding import Mesh

from hymba_jax.config import ComputeConfig, HymbaConfig
from hymba_jax.data import Tokenizer
from hymba_jax.errors import HymbaError
from hymba_jax.field_types import leaves
from hymba_jax.files import resolve_path
from hymba_jax.model import Hymba, arrange_layers
from hymba_jax.run_config import RunConfig, read_model_directory
from hymba_jax.training.checkpoint import load_params
from hymba_jax.training.state import AbstractTrainState, Params, TrainState, abstract_model


def check_start(config: RunConfig) -> None:
    """Raises HymbaError if `config.init_from` holds no model, or one with other parameters."""
    held = read_model_directory(config.init_from)[0].resolved()
    wanted = config.model.with_vocabulary(held.num_embeddings).resolved()
    if held != wanted and _shapes(held) != _shapes(wanted):
        before = dict(leaves(held, "model."))
        changed = [
            f"{name} is {before[name]!r} there, {value!r} here"
            for name, value in leaves(wanted, "model.")
            if value != before[name]
        ]
        raise HymbaError(
            f"{config.init_from}: its parameters do not fit this model ({'; '.join(changed)})"
        )


def describe_start(config: RunConfig) -> str:
    """What a run starts from, and what its model does otherwise with the same parameters."""
    held = dict(leaves(read_model_directory(config.init_from)[0].resolved(), "model."))
    changed = [
        f"{name} is {held[name]!r} there, {value!r} here"
        for name, value in leaves(config.model.resolved(), "model.")
        if value != held[name]
    ]
    return f"initialized from {config.init_from}" + (f": {'; '.join(changed)}" if changed else "")


def start_tokenizer(config: RunConfig) -> Tokenizer | None:
    """The tokenizer in `config.init_from`, where `data.tokenizer` would train another; else None.

    Another tokenizer's ids would have other meanings than the embeddings that the run starts from.
    """
    if config.data.bpe_size is None or not _has_tokenizer(config):
        return None
    return Tokenizer.load(config.init_from)


def check_start_tokenizer(config: RunConfig, tokenizer: Tokenizer) -> None:
    """Raises HymbaError if the tokenizer splits text otherwise than the one in `config.init_from`.

    It may have more tokens: embeddings are kept for those that were there.
    """
    if not _has_tokenizer(config):
        return
    held = Tokenizer.load(config.init_from)
    added = held.model.get_vocab().items() - tokenizer.model.get_vocab().items()
    if added or _splitting(held) != _splitting(tokenizer):
        raise HymbaError(
            f"{config.init_from}: its model knows the ids of its own tokenizer, those of "
            f"data.tokenizer {config.data.tokenizer} have other meanings: use --data.tokenizer "
            f"{config.init_from}, or train without init_from"
        )


def _has_tokenizer(config: RunConfig) -> bool:
    return (resolve_path(config.init_from) / "tokenizer.json").is_file()


def _splitting(tokenizer: Tokenizer) -> dict[str, Any]:
    """What of a tokenizer decides the ids of ordinary text."""
    parts = json.loads(tokenizer.model.to_str())
    return {name: parts[name] for name in ("model", "normalizer", "pre_tokenizer")}


def start_state(
    config: RunConfig,
    optimizer: optax.GradientTransformation,
    abstract: AbstractTrainState,
    mesh: Mesh,
) -> TrainState:
    """The state before the first step, with the parameters in `config.init_from`.

    Raises:
      HymbaError: they cannot be read.
    """
    scan_layers = read_model_directory(config.init_from)[1].scan_layers
    compute = dataclasses.replace(config.compute, scan_layers=scan_layers)
    graph, held = abstract_model(config.model, compute, mesh)
    params = load_params(config.init_from, held)
    if scan_layers != config.compute.scan_layers:
        model = arrange_layers(nnx.merge(graph, params), scan_layers=config.compute.scan_layers)
        params = nnx.to_pure_dict(nnx.state(model))
    params = jax.device_put(params, abstract.shardings.params)
    moments = jax.jit(optimizer.init, out_shardings=abstract.shardings.optimizer)(params)
    return TrainState(params, moments)


def _shapes(config: HymbaConfig) -> Params:
    compute = ComputeConfig(scan_layers=False)
    model = nnx.eval_shape(lambda: Hymba(config, compute, nnx.Rngs(0)))
    return jax.tree.map(lambda leaf: leaf.shape, nnx.to_pure_dict(nnx.state(model)))
