"""An HF checkpoint into the native directory of a standalone model."""

import json
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from hymba_jax.checkpoint.checkpoints import PARAMS
from hymba_jax.checkpoint.model_file import model_toml
from hymba_jax.config import ComputeConfig, DType
from hymba_jax.config.run import CONFIG_FILE
from hymba_jax.convert.arrays import contiguous
from hymba_jax.convert.hf_checkpoint import HFCheckpoint
from hymba_jax.convert.hf_config import with_dtype
from hymba_jax.convert.mapping import EMBEDDING, HEAD, TIED_COPY, HFSlice
from hymba_jax.convert.params_stream import LazyArray, write_params
from hymba_jax.convert.report import Report
from hymba_jax.hf_files import (
    COPIES_FILE,
    HF_CONFIG,
    NO_TOKENIZER,
    OTHER_FILES,
    TOKENIZER_FILES,
    companion_files,
)
from hymba_jax.model.abstract import ParamPath


def write_native(
    checkpoint: HFCheckpoint, directory: Path, dtype: str | None, report: Report
) -> None:
    """Writes config and parameters of a checked checkpoint, and the accompanying files; the config
    last.

    Args:
      dtype: of every parameter; each keeps its own if absent.

    Raises:
      HymbaError: the output projection is another than config.json says, or the parameters cannot
        be written.
    """
    params = {part.path: _convert(checkpoint, part, dtype, report) for part in checkpoint.hf_slices}
    write_params(directory / PARAMS, params)
    for file in companion_files(checkpoint.directory, (*TOKENIZER_FILES, *OTHER_FILES)):
        shutil.copyfile(file, directory / file.name)
    if not (directory / "tokenizer.json").exists():
        report.display.say(f"warning: {NO_TOKENIZER}")
    if checkpoint.has_tied_copy:
        (directory / COPIES_FILE).write_text(json.dumps(TIED_COPY) + "\n")
        report.display.say(f"{HEAD} equals {EMBEDDING}, one of them is kept")
    if checkpoint.has_only_head:
        report.display.say(f"{HEAD} is read as {EMBEDDING}, which it is tied to")
    if dtype is None:
        shutil.copyfile(checkpoint.directory / HF_CONFIG, directory / HF_CONFIG)
    else:
        settings = with_dtype(checkpoint.settings, dtype)
        (directory / HF_CONFIG).write_text(json.dumps(settings, indent=2) + "\n")
    toml = model_toml(checkpoint.config, _compute(checkpoint, params))
    (directory / CONFIG_FILE).write_text(toml, encoding="utf-8")


def _convert(
    checkpoint: HFCheckpoint, part: HFSlice, dtype: str | None, report: Report
) -> LazyArray:
    dtype = dtype or checkpoint.tensors[part.name].dtype

    def make() -> np.ndarray:
        rows = checkpoint.read(part.name, (slice(part.start, part.stop),))
        array = contiguous(part.layout.to_native(rows)).astype(dtype, copy=False)
        report.converted(part.name, rows, array)
        return array

    return LazyArray(part.shape, dtype, make)


def _compute(checkpoint: HFCheckpoint, params: dict[ParamPath, LazyArray]) -> ComputeConfig:
    """How the model computes unless told otherwise: in bfloat16 where that rounds no parameter."""
    rounded = (path for path, p in checkpoint.bfloat16_params.items() if p.dtype == jnp.bfloat16)
    dtype: DType = "float32"
    if all(params[path].dtype == "bfloat16" for path in rounded):
        dtype = "bfloat16"
    return ComputeConfig(dtype=dtype, param_dtype=dtype, scan_layers=False)
