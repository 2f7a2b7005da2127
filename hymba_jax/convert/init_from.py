"""A run that starts from the parameters of another run or model, native or HF."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import jax
import optax
from flax import nnx
from jax.sharding import Mesh

from hymba_jax.checkpoint.load import load_merged_params
from hymba_jax.checkpoint.model_file import read_model_directory
from hymba_jax.checkpoint.train_state import AbstractTrainState, TrainState, init_state_from
from hymba_jax.config import ComputeConfig, HymbaConfig
from hymba_jax.config.field_types import leaves
from hymba_jax.config.run import CONFIG_FILE
from hymba_jax.convert.hf_checkpoint import HFCheckpoint
from hymba_jax.convert.load_sharded import read_params
from hymba_jax.data import DataConfig
from hymba_jax.errors import HymbaError
from hymba_jax.files import resolve_location, resolve_path
from hymba_jax.hf_files import HF_CONFIG
from hymba_jax.model import stack_layers, unstack_layers
from hymba_jax.model.abstract import Params, abstract_model, param_shapes
from hymba_jax.tokenizer import Tokenizer


@dataclass(frozen=True)
class InitialModel:
    """The model that a run starts from, without its parameters.

    Attributes:
      directory: of a run, of a standalone model, or of an HF checkpoint.
      config: its architecture, nothing of which is "auto".
      scan_layers: whether its parameters are stored as those of scanned layers.
      tokenizer: its own, if it has one.
      hf: the HF checkpoint, if it is one.
    """

    directory: str
    config: HymbaConfig
    scan_layers: bool
    tokenizer: Tokenizer | None
    hf: HFCheckpoint | None = None

    def check_model(self, config: HymbaConfig) -> None:
        """Raises HymbaError if a model of this architecture has other parameters."""
        wanted = config.with_vocabulary(self.config.num_embeddings).resolved()
        if self.config != wanted and not _same_shapes(self.config, wanted):
            raise HymbaError(
                f"{self.directory}: its parameters do not fit this model "
                f"({'; '.join(self._differences(wanted))}): leave these fields out of the config's "
                "[model], or start from another model"
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
        if self.tokenizer is not None and not tokenizer.extends(self.tokenizer):
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
        seed: int,
    ) -> TrainState:
        """The state before the first step, with its parameters and a new optimizer.

        Args:
          seed: of a new adapter.

        Raises:
          HymbaError: they cannot be read.
        """
        params = self.load_params(config, compute, mesh)
        return init_state_from(params, config, compute, optimizer, abstract, seed)

    def load_params(self, config: HymbaConfig, compute: ComputeConfig, mesh: Mesh) -> Params:
        """Its parameters, where and as a run has them."""
        _, wanted = abstract_model(config, compute, mesh)
        if self.hf is not None:
            return read_params(self.hf.read, wanted, config, scan_layers=compute.scan_layers)
        stored = dataclasses.replace(compute, scan_layers=self.scan_layers)
        params = load_merged_params(self.directory, config, stored, mesh)
        if self.scan_layers != compute.scan_layers:
            relayout = stack_layers if compute.scan_layers else unstack_layers
            graph, _ = abstract_model(config, stored, mesh)
            params = nnx.to_pure_dict(nnx.state(relayout(nnx.merge(graph, params))))
        return jax.device_put(params, jax.tree.map(lambda like: like.sharding, wanted))

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
    location = resolve_location(directory)
    has_tokenizer = (location / "tokenizer.json").is_file()
    tokenizer = Tokenizer.load(directory) if has_tokenizer else None
    if hf := _hf_checkpoint(directory):
        hf.check()
        return InitialModel(directory, hf.config.resolved(), False, tokenizer, hf)
    config, compute = read_model_directory(directory)
    return InitialModel(directory, config.resolved(), compute.scan_layers, tokenizer)


def read_config(directory: str) -> HymbaConfig:
    """The architecture of the model in the directory that `init_from` names.

    Raises:
      HymbaError: as for `read_initial_model`.
    """
    hf = _hf_checkpoint(directory)
    return hf.config if hf else read_model_directory(directory)[0]


def _hf_checkpoint(directory: str) -> HFCheckpoint | None:
    """The HF checkpoint in a directory, if it is one; native ones may keep its files."""
    path = resolve_location(directory)
    is_hf = not (path / CONFIG_FILE).is_file() and (path / HF_CONFIG).is_file()
    return HFCheckpoint(resolve_path(directory)) if is_hf else None


def _same_shapes(*configs: HymbaConfig) -> bool:
    first, second = (param_shapes(config, scan_layers=False) for config in configs)
    return first == second
