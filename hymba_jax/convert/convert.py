"""`hymba convert`: HF checkpoints to native ones, and the other way round."""

import math
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import jax
import tyro

from hymba_jax.checkpoint.checkpoints import PARAMS, Step, resolve_step
from hymba_jax.checkpoint.load import load_model
from hymba_jax.checkpoint.local_copy import local_copy
from hymba_jax.checkpoint.model_file import what_else
from hymba_jax.checkpoint.run_lock import check_unlocked
from hymba_jax.config import ComputeConfig
from hymba_jax.config.run import CONFIG_FILE
from hymba_jax.convert.hf_checkpoint import HFCheckpoint
from hymba_jax.convert.hf_to_native import write_native
from hymba_jax.convert.load_sharded import load_hf
from hymba_jax.convert.manifest import not_written, write_manifest
from hymba_jax.convert.native_checkpoint import NativeCheckpoint
from hymba_jax.convert.native_to_hf import write_hf
from hymba_jax.convert.report import Report
from hymba_jax.convert.tensor_file import TensorInfo
from hymba_jax.convert.verify import Expected, compare, read_expected
from hymba_jax.display import Display, format_bytes
from hymba_jax.errors import HymbaError
from hymba_jax.files import resolve_location, resolve_path, written_beside
from hymba_jax.hf_files import HF_CONFIG
from hymba_jax.model import Hymba
from hymba_jax.parallel.mesh import make_mesh

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}


@dataclass(frozen=True)
class ConvertConfig:
    """Converts an HF checkpoint to a native one, or a native one to an HF one.

    The direction is inferred from SOURCE. Without --dtype, the conversion is bit-exact.

    Attributes:
      source: directory of an HF checkpoint (config.json, .safetensors or pytorch_model.bin,
        tokenizer), of a training run, or of a standalone model; local, gs:// or s3://, of which
        a copy is made.
      target: local directory to write.
      dtype: cast all tensors to this dtype.
      max_shard_size: of one safetensors file, such as 500MB or 2GiB.
      step: which checkpoint of a run, or "best", of the lowest validation loss; the newest if
        absent.
      verify: .npz file with input_ids and the logits to compare those of the written model with.
      tolerance: maximum difference of logits.
      overwrite: replaces what an earlier conversion wrote to TARGET, and never anything else.
    """

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
    target: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="TARGET")]
    dtype: Literal["bfloat16", "float16", "float32"] | None = None
    max_shard_size: str = "5GB"
    step: Step | None = None
    verify: str = ""
    tolerance: float = 5e-4
    overwrite: bool = False


def main(args: ConvertConfig) -> None:
    """Converts, and prints a report.

    Raises:
      HymbaError: the source is not a complete checkpoint, the target cannot be written, or the
        logits of what was written differ from the expected ones.
    """
    location, target = resolve_location(args.source), resolve_path(args.target)
    max_shard_bytes = parse_size(args.max_shard_size)
    if not 0 <= args.tolerance < math.inf:
        raise HymbaError(f"tolerance is {args.tolerance}, not a number >= 0")
    step = resolve_step(location, args.step)
    with local_copy(location, step, PARAMS) as source:
        _convert(source, step, target, max_shard_bytes, args)


def _convert(
    source: Path, step: int | None, target: Path, max_shard_bytes: int, args: ConvertConfig
) -> None:
    _check_target(source, target, args.overwrite)
    checkpoint = open_checkpoint(source, step)
    checkpoint.check()
    expected = read_expected(resolve_path(args.verify), checkpoint.config) if args.verify else None
    _check_space(target, checkpoint.tensors, args.dtype)
    with Display() as display:
        size = sum(info.nbytes for info in checkpoint.tensors.values())
        report = Report(display, size)
        display.begin(f"converting {format_bytes(size)}")
        with written_beside(target) as beside:
            if isinstance(checkpoint, NativeCheckpoint):
                write_hf(checkpoint, beside, args.dtype, max_shard_bytes, report)
            else:
                write_native(checkpoint, beside, args.dtype, report)
            write_manifest(beside)
            _check_target(source, target, args.overwrite)  # again: the conversion took a while
            display.begin("waiting for the disk")
        report.finish()
        display.say(f"done: {target}")
        if expected is not None:
            display.begin("computing logits")
            _verify(target, expected, args, display)


def open_checkpoint(directory: Path, step: int | None = None) -> NativeCheckpoint | HFCheckpoint:
    """The checkpoint of either kind that a directory holds.

    Args:
      step: which checkpoint of a training run, see `ConvertConfig`.

    Raises:
      HymbaError: it holds none, or an incomplete one.
    """
    if (directory / CONFIG_FILE).is_file():
        return NativeCheckpoint(directory, step)
    if not (directory / HF_CONFIG).is_file():
        raise HymbaError(
            f"{directory}: no checkpoint found, "
            + (what_else(directory) or f"neither {CONFIG_FILE} (native) nor {HF_CONFIG} (HF)")
        )
    if step is not None:
        raise HymbaError(f"{directory}: an HF checkpoint has no steps")
    return HFCheckpoint(directory)


def parse_size(text: str) -> int:
    """Bytes of a size such as 5GB, 500MB or 2GiB. Raises HymbaError where it is none."""
    match = re.fullmatch(
        r"(\d{1,18}(?:\.\d{1,18})?)\s*([KMG]I?)?B?", text.strip().upper(), re.ASCII
    )
    size = int(float(match[1]) * _UNITS[match[2] or ""]) if match else 0
    if size < 1:
        shown = text if len(text) <= 40 else f"{text[:40]}..."
        raise HymbaError(f"max_shard_size is {shown!r}, not a size such as 500MB, 5GB or 2GiB")
    return size


def _check_target(source: Path, target: Path, overwrite: bool) -> None:
    if target.resolve() in (source.resolve(), *source.resolve().parents):
        raise HymbaError(f"{target}: is or holds the source, choose another target")
    if not target.exists():
        return
    check_unlocked(target)
    if not overwrite:
        raise HymbaError(f"{target}: exists already, choose another target or --overwrite")
    if not target.is_dir():
        raise HymbaError(f"{target}: is not a directory, choose another target")
    if others := not_written(target):
        raise HymbaError(
            f"{target}: holds {', '.join(others[:5])}{', ...' if len(others) > 5 else ''}, not "
            "written by a conversion: choose another target, or move them away"
        )


def _check_space(target: Path, tensors: dict[str, TensorInfo], dtype: str | None) -> None:
    """Raises HymbaError if the disk lacks space for the tensors."""
    needed = sum(info._replace(dtype=dtype or info.dtype).nbytes for info in tensors.values())
    place = target.absolute().parent
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed:
        raise HymbaError(
            f"{target}: needs {format_bytes(needed)}, the disk has {format_bytes(free)} free: "
            "make space, or choose another target"
        )


def _verify(target: Path, expected: Expected, args: ConvertConfig, display: Display) -> None:
    """Compares what the written model computes. Raises HymbaError beyond the tolerance."""
    agreement = compare(_load_written(target), expected)
    display.say(
        f"logits: max difference {agreement.max_difference:.3g}, "
        f"KL divergence {agreement.kl_divergence:.3g}, "
        f"top-1 agreement {agreement.top_1:.2%}"
    )
    if not agreement.max_difference <= args.tolerance:  # nor is NaN
        raise HymbaError(
            f"{target}: was written, but its logits differ from those of {args.verify} by "
            f"{agreement.max_difference:.3g}, more than the tolerance {args.tolerance:g}"
        )


def _load_written(target: Path) -> Hymba:
    """The model of a checkpoint of either kind, in float32."""
    if (target / CONFIG_FILE).is_file():
        return load_model(target, dtype="float32")
    return load_hf(target, ComputeConfig(), make_mesh(jax.devices()[:1]))
