"""A standalone model, in a directory that `load` reads."""

import os

from flax import nnx

from hymba_jax.checkpoint.checkpoints import save_params
from hymba_jax.checkpoint.model_file import model_toml
from hymba_jax.config.run import CONFIG_FILE
from hymba_jax.data import Tokenizer
from hymba_jax.errors import HymbaError
from hymba_jax.files import resolve_path, written_beside
from hymba_jax.model import Hymba


def save_model(directory: str | os.PathLike[str], model: Hymba, tokenizer: Tokenizer) -> None:
    """Writes config, parameters and tokenizer, atomically; `hymba_jax.load` reads them.

    For programs of one's own: it is how a model that was not trained by `hymba train` gets a
    directory that all commands take.

    Raises:
      HymbaError: the directory exists already, or the parameters cannot be written.
    """
    directory = resolve_path(directory)
    if directory.exists():
        raise HymbaError(f"{directory}: exists already, choose another directory")
    with written_beside(directory) as beside:
        tokenizer.save(beside)
        save_params(beside, nnx.to_pure_dict(nnx.state(model)))
        (beside / CONFIG_FILE).write_text(model_toml(model.config, model.compute), encoding="utf-8")
