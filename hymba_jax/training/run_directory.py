"""The run directory: complete in itself, with config, tokenizer, metrics and checkpoints."""

import dataclasses
import hashlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from hymba_jax.data import Tokenizer
from hymba_jax.distributed import is_same, wait_for_all
from hymba_jax.errors import HymbaError
from hymba_jax.field_types import leaves
from hymba_jax.files import replace_text
from hymba_jax.run_config import CONFIG_FILE, RunConfig
from hymba_jax.training.checkpoint_folder import FOLDER, checkpoint_steps
from hymba_jax.types import UInt

_SEEN_WITHIN = 10  # seconds: file systems of a network may remember what was not there


def is_resumed(config: RunConfig) -> bool:
    """Whether the run directory holds a checkpoint to go on from.

    Raises:
      HymbaError: it does, but of a run that this config does not continue.
    """
    directory = Path(config.output)
    if not checkpoint_steps(directory):
        return False
    if not (directory / CONFIG_FILE).is_file():
        raise HymbaError(
            f"{directory}: has {FOLDER} but no {CONFIG_FILE}, so it is no run of this program: "
            "choose another output"
        )
    before = dict(_lasting(RunConfig.from_toml(directory / CONFIG_FILE)))
    changed = [
        f"{name} was {before[name]!r}, is {value!r}"
        for name, value in _lasting(config)
        if value != before[name] and value != "auto"  # which is what the run has found
    ]
    if changed:
        raise HymbaError(
            f"{directory}: holds another run, which this config does not continue "
            f"({'; '.join(changed)}): choose another output, or undo the change"
        )
    return True


def write_run_directory(config: RunConfig, tokenizer: Tokenizer) -> None:
    """Makes the directory and writes what generating text needs beside a checkpoint."""
    directory = Path(config.output)
    directory.mkdir(parents=True, exist_ok=True)
    replace_text(directory / CONFIG_FILE, config.to_toml())
    tokenizer.save(directory)


def check_shared(config: RunConfig, corpus: str) -> None:
    """Raises HymbaError unless all processes of the run see the same checkpoints and text.

    Args:
      corpus: fingerprint of the training tokens.
    """
    steps = checkpoint_steps(config.output)
    if not is_same(steps[-1] if steps else 0):
        raise HymbaError(
            f"{config.output}: process {jax.process_index()} sees other checkpoints there than "
            "process 0: choose an output on a file system that all share"
        )
    if not is_same(np.frombuffer(corpus.encode(), np.uint8)):
        raise HymbaError(
            f"{config.data.path or 'standard library'}: process {jax.process_index()} reads other "
            "text there than process 0: give all of them the same"
        )


def check_written(config: RunConfig) -> None:
    """Raises HymbaError unless all processes see what the first of them wrote."""
    wait_for_all("the run directory")
    deadline = time.monotonic() + _SEEN_WITHIN
    while not (Path(config.output) / CONFIG_FILE).is_file():
        if time.monotonic() > deadline:
            raise HymbaError(
                f"{config.output}: process {jax.process_index()} does not see what process 0 wrote "
                "there: choose an output on a file system that all share"
            )
        time.sleep(0.1)


def fingerprint(tokens: UInt[np.ndarray, " stream"]) -> str:
    """Tells one stream of training tokens from another."""
    return hashlib.blake2b(np.ascontiguousarray(tokens).data, digest_size=16).hexdigest()


def _lasting(config: RunConfig) -> Iterator[tuple[str, Any]]:
    """What a resumed run cannot change: the arrays and their layout, and the order of the data.

    The place of the corpus may change: its tokens are compared, by their fingerprint.
    """
    yield "seed", config.seed
    yield "training.batch_size", config.training.batch_size
    yield "compute.param_dtype", config.compute.param_dtype
    yield "compute.scan_layers", config.compute.scan_layers
    data = dataclasses.replace(config.data, path="")
    yield from leaves(data, "data.")
    yield from leaves(config.model.resolved(), "model.")
