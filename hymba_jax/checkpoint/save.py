"""A standalone model, in a directory that `load` reads."""

import os
from pathlib import Path

from flax import nnx

from hymba_jax.checkpoint.checkpoints import save_params
from hymba_jax.checkpoint.model_file import model_toml
from hymba_jax.config.run import CONFIG_FILE
from hymba_jax.errors import HymbaError
from hymba_jax.files import resolve_path, written_beside
from hymba_jax.hf_files import keep_hf_files
from hymba_jax.model import Hymba
from hymba_jax.tokenizer import Tokenizer


def save_model(
    directory: str | os.PathLike[str],
    model: Hymba,
    tokenizer: Tokenizer,
    *,
    hf_files_of: str | os.PathLike[str] = "",
) -> None:
    """Writes config, parameters and tokenizer, atomically; `hymba_jax.load` reads them.

    For programs of one's own: it is how a model that was not trained by `hymba train` gets a
    directory that all commands take.

    Args:
      hf_files_of: directory of a run whose HF files are copied, if it has any.

    Raises:
      HymbaError: the directory exists already, or the parameters cannot be written.
    """
    directory = resolve_path(directory)
    check_absent(directory)
    with written_beside(directory) as beside:
        tokenizer.save(beside)
        keep_hf_files(hf_files_of, beside)
        save_params(beside, nnx.to_pure_dict(nnx.state(model)))
        (beside / CONFIG_FILE).write_text(model_toml(model.config, model.compute), encoding="utf-8")


def check_absent(directory: Path) -> None:
    """Raises HymbaError if the directory exists."""
    if directory.exists():
        raise HymbaError(f"{directory}: exists already, choose another directory")
