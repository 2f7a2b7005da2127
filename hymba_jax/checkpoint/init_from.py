"""A run that starts from the parameters of another run or model."""

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import optax
from flax import nnx
from jax.sharding import Mesh

from hymba_jax.checkpoint.checkpoints import load_params
from hymba_jax.checkpoint.model_file import read_model_directory
from hymba_jax.checkpoint.train_state import AbstractTrainState, TrainState
from hymba_jax.config import ComputeConfig, HymbaConfig
from hymba_jax.config.field_types import leaves
from hymba_jax.data import DataConfig
from hymba_jax.errors import HymbaError
from hymba_jax.files import resolve_location
from hymba_jax.model import stack_layers, unstack_layers
from hymba_jax.model.abstract import abstract_model, param_shapes
from hymba_jax.tokenizer import Tokenizer


@dataclass(frozen=True)
class InitialModel:
    """The model that a run starts from, without its parameters.

    Attributes:
      directory: of a run, or of a standalone model.
      config: its architecture, nothing of which is "auto".
      scan_layers: whether its parameters are stored as those of scanned layers.
      tokenizer: its own, if it has one.
    """

    directory: str
    config: HymbaConfig
    scan_layers: bool
    tokenizer: Tokenizer | None

    def check_model(self, config: HymbaConfig) -> None:
        """Raises HymbaError if a model of this architecture has other parameters."""
        wanted = config.with_vocabulary(self.config.num_embeddings).resolved()
        if self.config != wanted and not _same_shapes(self.config, wanted):
            raise HymbaError(
                f"{self.directory}: its parameters do not fit this model "
                f"({'; '.join(self._differences(wanted))})"
            )

    def tokenizer_for(self, data: DataConfig) -> Tokenizer | None:
        """Its own tokenizer, where data.tokenizer would train another; else None.

        Another tokenizer's ids would not be those of the embeddings.
        """
        return None if data.bpe_size is None else self.tokenizer

    def check_tokenizer(self, tokenizer: Tokenizer, name: str) -> None:
        """Raises HymbaError if a tokenizer encodes ordinary text differently than the model's own.

        It may have more tokens: embeddings are kept for those that were there.

        Args:
          name: of the tokenizer, as data.tokenizer has it.
        """
        if self.tokenizer is None:
            return
        own, vocabulary = self.tokenizer, tokenizer.model.get_vocab()
        added = own.model.get_vocab().items() - vocabulary.items()
        if added or _tokenization(own) != _tokenization(tokenizer):
            raise HymbaError(
                f"{self.directory}: its embeddings belong to the ids of its own tokenizer, "
                f"data.tokenizer {name} has different ones: use --data.tokenizer "
                f"{self.directory}, or train without init_from"
            )

    def describe(self, config: HymbaConfig) -> str:
        """A line that names the model, and how the run's differs."""
        differences = "; ".join(self._differences(config.resolved()))
        return f"initialized from {self.directory}" + (differences and f": {differences}")

    def load_state(
        self,
        config: HymbaConfig,
        compute: ComputeConfig,
        optimizer: optax.GradientTransformation,
        abstract: AbstractTrainState,
        mesh: Mesh,
    ) -> TrainState:
        """The state before the first step, with its parameters and a new optimizer.

        Raises:
          HymbaError: they cannot be read.
        """
        stored = dataclasses.replace(compute, scan_layers=self.scan_layers)
        graph, like = abstract_model(config, stored, mesh)
        params = load_params(self.directory, like)
        if self.scan_layers != compute.scan_layers:
            relayout = stack_layers if compute.scan_layers else unstack_layers
            model = relayout(nnx.merge(graph, params))
            params = nnx.to_pure_dict(nnx.state(model))
        params = jax.device_put(params, abstract.shardings.params)
        moments = jax.jit(optimizer.init, out_shardings=abstract.shardings.optimizer)(params)
        return TrainState(params, moments)

    def _differences(self, config: HymbaConfig) -> Iterator[str]:
        own = dict(leaves(self.config, "model."))
        for name, value in leaves(config, "model."):
            if value != own[name]:
                yield f"{name} is {own[name]!r} there, {value!r} here"


def read_initial_model(directory: str) -> InitialModel:
    """The model in the directory that `init_from` names.

    Raises:
      HymbaError: there is no model, or its config or tokenizer cannot be read.
    """
    config, compute = read_model_directory(directory)
    has_tokenizer = (resolve_location(directory) / "tokenizer.json").is_file()
    tokenizer = Tokenizer.load(directory) if has_tokenizer else None
    return InitialModel(directory, config.resolved(), compute.scan_layers, tokenizer)


def _tokenization(tokenizer: Tokenizer) -> dict[str, Any]:
    """The part of a tokenizer that determines the ids of ordinary text."""
    parts = json.loads(tokenizer.model.to_str())
    return {name: parts[name] for name in ("model", "normalizer", "pre_tokenizer")}


def _same_shapes(*configs: HymbaConfig) -> bool:
    first, second = (param_shapes(config, scan_layers=False) for config in configs)
    return first == second
