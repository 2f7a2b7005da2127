"""The file that says what model a directory holds: the config of its run, or of the model alone."""

import dataclasses
import os
from pathlib import Path

from hymba_jax.config import ComputeConfig, HymbaConfig
from hymba_jax.config.data import MIN_VOCAB_SIZE, DataConfig
from hymba_jax.config.run import CONFIG_FILE, RunConfig, read_table
from hymba_jax.config.toml import override_from, toml_lines
from hymba_jax.data.tokenized import is_tokenized
from hymba_jax.errors import HymbaError
from hymba_jax.files import Location, resolve_location
from hymba_jax.hf_files import ADAPTER_CONFIG, HF_CONFIG, download_advice
from hymba_jax.model.trainable import Trainable
from hymba_jax.run_files import checkpoint_steps
from hymba_jax.tokenizer import Tokenizer


def read_model(
    path: str | os.PathLike[str], step: int | None = None
) -> tuple[HymbaConfig, ComputeConfig]:
    """The model of a file and how it computes, ignoring the rest of a run without stages.

    A vocab_size of "auto" becomes a number as in `with_vocabulary`.

    Args:
      step: of the checkpoint, whose stage the model is of; if absent, it is of the last stage.

    Raises:
      HymbaError: as for `RunConfig.from_toml`.
    """
    base, table = read_table(path, RunConfig())
    if table.get("stages"):
        run = with_vocabulary(override_from(path, base, table))
        stage = run.resolved_stages[-1] if step is None else run.stage_at(step)
        return stage.run.model, run.compute
    model = override_from(path, base.model, table.get("model", {}))
    if model.vocab_size == "auto":
        data = override_from(path, base.data, table.get("data", {}))
        model = model.with_vocabulary(_vocabulary(data))
    return model, override_from(path, base.compute, table.get("compute", {}))


def with_vocabulary(run: RunConfig) -> RunConfig:
    """The run with a number for a vocab_size of "auto", before there is text.

    It is the size of the tokenizer, for a BPE the one that is asked for: trained on very little
    text it can come out smaller.

    Raises:
      HymbaError: the tokenizer cannot be read.
    """
    if run.model.vocab_size != "auto":
        return run
    return dataclasses.replace(run, model=run.model.with_vocabulary(_vocabulary(run.data)))


def _vocabulary(data: DataConfig) -> int:
    if data.tokenizer == "bytes":
        return MIN_VOCAB_SIZE
    return data.bpe_size or Tokenizer.load(data.tokenizer).vocab_size


def read_model_directory(
    directory: str | os.PathLike[str], step: int | None = None
) -> tuple[HymbaConfig, ComputeConfig]:
    """The model that a native directory holds and how it computes.

    Args:
      step: which checkpoint of a run; the newest if absent.

    Raises:
      HymbaError: there is none, or its file cannot be read.
    """
    directory = resolve_location(directory)
    if (directory / CONFIG_FILE).is_file():
        steps = checkpoint_steps(directory)
        return read_model(directory / CONFIG_FILE, steps[-1] if steps and step is None else step)
    reason = what_else(directory) or f"{CONFIG_FILE} is missing"
    if (directory / HF_CONFIG).is_file():
        reason += f": convert the HF checkpoint first, hymba convert {directory} TARGET"
    elif (directory / ADAPTER_CONFIG).is_file():
        reason += f": it is an adapter, generate with --model BASE --adapter {directory}"
    raise HymbaError(f"{directory}: no model found, {reason}")


def what_else(directory: Location) -> str:
    """What a directory without a model is, and what to do; empty if that is not known."""
    if not directory.exists():
        return f"there is no such directory{download_advice(directory)}"
    if isinstance(directory, Path) and is_tokenized(directory):
        return f"it is a tokenized corpus: hymba tokenize --check --output {directory} reads it"
    return ""


def read_trainable(path: str | os.PathLike[str]) -> Trainable:
    """The parameters that the run of a file trains; of a model all.

    Args:
      path: of the file, or of the directory that has it.

    Raises:
      HymbaError: it cannot be read.
    """
    path = resolve_location(path)
    path = path if path.is_file() else path / CONFIG_FILE
    base, table = read_table(path, RunConfig())
    adapter = override_from(path, base.adapter, table.get("adapter", {}))
    training = override_from(path, base.training, table.get("training", {}))
    return Trainable(adapter, training.freeze)


def model_toml(model: HymbaConfig, compute: ComputeConfig) -> str:
    """A file of which `read_model` reads these two."""
    lines = [*toml_lines(model, "model"), *toml_lines(compute, "compute")]
    return "\n".join(lines).lstrip() + "\n"
