"""A model and its tokenizer, from a directory."""

import os
from dataclasses import dataclass
from pathlib import Path

from hymba_jax.checkpoint.checkpoints import Step, resolve_step
from hymba_jax.checkpoint.load import load_model
from hymba_jax.checkpoint.model_file import read_model_directory
from hymba_jax.config import CacheFormat, DType, WeightFormat
from hymba_jax.config.field_types import misfit, shown
from hymba_jax.convert.peft import merge_peft, peft_tokenizer
from hymba_jax.errors import HymbaError
from hymba_jax.files import resolve_location, resolve_path
from hymba_jax.inference.generation_config import read_generation_defaults
from hymba_jax.inference.language_model import LanguageModel
from hymba_jax.tokenizer import Tokenizer


def load(
    directory: str | os.PathLike[str],
    *,
    dtype: DType | None = None,
    state_dtype: DType = "float32",
    weights: WeightFormat = "float",
    kv_cache: CacheFormat = "float",
    batch_size: int = 8,
    context: int | None = None,
    max_chunk: int | None = None,
    speculate: bool = False,
    prefix_states: int = 0,
    step: Step | None = None,
    adapter: str | os.PathLike[str] = "",
) -> LanguageModel:
    """The model of a training run, or of a directory that holds a standalone model, on one device.

    Of a model that comes from an HF checkpoint, generation_config.json says which tokens end a
    sequence and how to sample unless told otherwise, see `LanguageModel.defaults`.

    Args:
      dtype: of parameters, activations and cache; by default that of the training, but float32 on
        CPUs, where it is fastest.
      state_dtype: that the SSM's states are kept in between tokens.
      weights: of matmuls, "float" as the model has them or "int8".
      kv_cache: format of keys and values between tokens, "float" in `dtype` or "int8".
      batch_size: sequences that are decoded at the same time.
      context: tokens of every sequence's cache; as many as each batch needs if absent.
      max_chunk: tokens of a prompt that are prefilled at once; 1024 if absent, and 64 with
        `prefix_states`.
      speculate: draft the next tokens from earlier ones of the sequence, see `LanguageModel`.
      prefix_states: states after beginnings of prompts that are kept; give `context` with it, see
        `LanguageModel`.
      step: which checkpoint of a run, or "best", of the lowest validation loss; the newest if
        absent.
      adapter: local directory of a PEFT adapter, which is merged into the model; a tokenizer with
        a chat template that is there is used.

    Raises:
      HymbaError: the directory holds no model, a part of it cannot be read, or it does not fit
        into the device's memory; or the adapter belongs to another model.
    """
    if not isinstance(directory, str | os.PathLike):
        raise HymbaError(f"directory is {shown(directory)}, not a path")
    if problem := misfit(dtype, DType | None):
        raise HymbaError(f"dtype {problem}")
    step = resolve_step(directory, step)
    config = read_model_directory(directory, step)[0]  # first: it reports a missing model
    if not (resolve_location(directory) / "tokenizer.json").exists():
        raise HymbaError(f"{directory}: the model has no tokenizer: put its tokenizer.json there")
    tokenizer = Tokenizer.load(directory)
    tokenizer.check_fits(config, str(directory))
    if adapter:
        tokenizer = peft_tokenizer(resolve_path(adapter), tokenizer, config)
    model = load_model(directory, dtype=dtype, step=step)
    if adapter:
        model = merge_peft(resolve_path(adapter), model)
    return LanguageModel(
        model,
        tokenizer,
        defaults=read_generation_defaults(resolve_location(directory)),
        state_dtype=state_dtype,
        weights=weights,
        kv_cache=kv_cache,
        batch_size=batch_size,
        context=context,
        max_chunk=max_chunk,
        speculate=speculate,
        prefix_states=prefix_states,
    )


@dataclass(frozen=True)
class ModelChoice:
    """The model that a command works with.

    Attributes:
      model: directory of a training run, or of a standalone model; local, gs:// or s3://.
      step: which checkpoint of a run, or "best", of the lowest validation loss; the newest if
        absent.
      adapter: local directory of a PEFT adapter to merge into the model.
      dtype: of parameters, activations and cache; that of the training if absent, float32 on CPUs.
      state_dtype: that the SSM's states are kept in between tokens.
      weights: of matmuls, "float" as the model has them or "int8", with a scale for each output.
      kv_cache: format of keys and values between tokens, "float" in `dtype` or "int8", with a scale
        for each head of each token.
      batch_size: sequences that are decoded at the same time.
      context: tokens of every sequence's cache; if absent, as many as each batch needs, or in
        `serve` and `batch` the model's maximum for every slot.
    """

    model: str
    step: Step | None = None
    adapter: str = ""
    dtype: DType | None = None
    state_dtype: DType = "float32"
    weights: WeightFormat = "float"
    kv_cache: CacheFormat = "float"
    batch_size: int = 8
    context: int | None = None

    @property
    def name(self) -> str:
        """Of the directory, also where `model` is a path such as "." or "..".

        Raises:
          HymbaError: as for `resolve_location`.
        """
        location = resolve_location(self.model)
        return Path(os.path.abspath(location)).name if isinstance(location, Path) else location.name

    def load(
        self, *, max_chunk: int | None = None, speculate: bool = False, prefix_states: int = 0
    ) -> LanguageModel:
        """The model, as of `load`. Raises HymbaError if there is none."""
        options = {name: value for name, value in vars(self).items() if name != "model"}
        options |= {"speculate": speculate, "prefix_states": prefix_states}
        return load(self.model, max_chunk=max_chunk, **options)
