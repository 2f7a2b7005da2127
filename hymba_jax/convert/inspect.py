"""`hymba inspect`: the contents of an HF or native checkpoint."""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

from hymba_jax.checkpoint.checkpoints import Step, loaded_step
from hymba_jax.checkpoint.local_copy import local_copy
from hymba_jax.config import HymbaConfig
from hymba_jax.convert.convert import open_checkpoint
from hymba_jax.convert.hf_checkpoint import HFCheckpoint
from hymba_jax.convert.mapping import DTYPES
from hymba_jax.convert.native_checkpoint import NativeCheckpoint
from hymba_jax.convert.tensor_file import TensorInfo
from hymba_jax.display import format_bytes
from hymba_jax.errors import HymbaError, printable
from hymba_jax.files import resolve_location
from hymba_jax.hf_files import NO_CODE, NO_TOKENIZER, missing_for_transformers
from hymba_jax.model.abstract import ParamPath, param_shapes

# A parameter belongs to the first part that its path has a name of.
_PARTS = (
    ("embedding", ("embedding",)),
    ("output projection", ("lm_head",)),
    ("meta tokens", ("meta_tokens",)),
    ("attention", ("attention",)),
    ("SSM", ("ssm",)),
    ("fusion of both", ("mixer",)),
    ("MLP", ("mlp",)),
    ("norms of the residual stream", ("mixer_norm", "mlp_norm", "final_norm")),
)


@dataclass(frozen=True)
class InspectConfig:
    """Prints what a checkpoint holds: an HF one, a standalone model or a training run.

    Of HF checkpoints only headers are read; the arrays of native ones, of a run's checkpoint also
    optimizer state and loop state, are compared with their checksums. The exit status is 1 where
    something is missing, damaged or does not fit, also if only transformers needs it; but not
    because a model that was trained here has no code for transformers.

    Attributes:
      path: directory of the checkpoint.
      step: which checkpoint of a run, or "best", of the lowest validation loss; the newest if
        absent.
    """

    path: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PATH")]
    step: Step | None = None


def main(args: InspectConfig) -> None:
    """Prints a table.

    Raises:
      HymbaError: there is no checkpoint, a file of it cannot be read, or it is not complete.
    """
    location = resolve_location(args.path)
    step = loaded_step(location, args.step)
    with local_copy(location, step) as directory:
        _inspect(open_checkpoint(directory, step), args.path, step)


def _inspect(checkpoint: NativeCheckpoint | HFCheckpoint, path: str, step: int | None) -> None:
    config = checkpoint.config
    table = Table(title=Text(printable(path)), show_header=False)
    table.add_row("form", "native" if isinstance(checkpoint, NativeCheckpoint) else "HF")
    if step is not None:
        table.add_row("step", f"{step:,}")
    if isinstance(checkpoint, NativeCheckpoint) and checkpoint.adapter:
        adapter = checkpoint.adapter
        table.add_row("adapter", f"{adapter.kind} of rank {adapter.rank}, used merged")
    for name, value in _architecture(config):
        table.add_row(name, value)
    table.add_section()
    parts = count_by_part(config)
    for name, count in parts.items():
        table.add_row(f"parameters, {name}", f"{count:,}")
    table.add_row("parameters", f"{parts.total():,}", end_section=True)
    for dtype, (tensors, size) in _by_dtype(checkpoint.tensors).items():
        table.add_row(Text(printable(dtype)), f"{tensors:,} tensors, {format_bytes(size)}")
    problems, lacks = checkpoint.problems(), []
    if isinstance(checkpoint, HFCheckpoint):
        missing = missing_for_transformers(checkpoint.directory, checkpoint.settings)
        if NO_CODE in missing:  # as of every model that was trained here
            missing.remove(NO_CODE)
            table.add_row("transformers", NO_CODE)
            lacks.append("transformers' code")
        problems += [f"transformers cannot load it: {what}" for what in missing]
    elif not problems:
        problems = checkpoint.damage()
    has_tokenizer = (checkpoint.directory / "tokenizer.json").is_file()
    if not has_tokenizer:
        table.add_row("tokenizer", NO_TOKENIZER)
        lacks.append("a tokenizer")
    is_complete = f"yes, but for {' and '.join(lacks)}" if lacks else "yes"
    table.add_row("complete", "no" if problems else is_complete)
    Console().print(table)
    if problems:
        raise HymbaError(f"{path}: not a complete checkpoint: " + "; ".join(problems))


def count_by_part(config: HymbaConfig) -> Counter[str]:
    """Parameters of an architecture, by purpose."""
    counts: Counter[str] = Counter()
    for path, shape in param_shapes(config, scan_layers=False).items():
        counts[_part(path)] += math.prod(shape)
    return counts


def _part(path: ParamPath) -> str:
    return next(part for part, names in _PARTS if set(names) & set(path))


def _architecture(config: HymbaConfig) -> list[tuple[str, str]]:
    attention, ssm = config.attention, config.ssm
    return [
        ("layers", f"{config.num_layers}: {config.layers}"),
        ("hidden size", f"{config.hidden_size:,}, MLP {config.mlp_size:,}"),
        (
            "attention",
            f"{attention.num_heads} heads on {attention.num_kv_heads}, keys of "
            f"{config.head_dim}, values of {config.value_dim}, window {attention.window:,}",
        ),
        ("SSM", f"{config.channels:,} channels of {ssm.state_size} states"),
        ("meta tokens", f"{config.num_meta_tokens}"),
        ("vocabulary", f"{config.num_embeddings:,}, {'' if config.tie_embeddings else 'not '}tied"),
        ("positions", f"{config.max_positions:,}, rope {config.rope_type}"),
    ]


def _by_dtype(tensors: Mapping[str, TensorInfo]) -> dict[str, tuple[int, int]]:
    """How many tensors there are of each dtype, and their bytes."""
    counts: dict[str, tuple[int, int]] = {}
    for info in tensors.values():
        count, size = counts.get(info.dtype, (0, 0))
        nbytes = info.nbytes if info.dtype in DTYPES else 0
        counts[info.dtype] = (count + 1, size + nbytes)
    return counts
