"""Speed and memory of converting the 1.5B, in both directions, beside copying its file.

    python benchmarks/convert.py --folder /some/disk

Writes an HF checkpoint of random bfloat16 weights (3 GB), converts it and converts the result
back, each in a process of its own, and copies its file. A virtual machine's memory that was free
for seconds may have gone back to its host, and takes ten times as long to write to; so that all
find it alike, twice as much as they write is touched just before each. Memory is the process's peak
of resident pages above what it has once JAX and hymba_jax are imported; times are until the data is
on the disk, of the copy too. Needs 4 times the space of the checkpoint; leaves nothing behind.
"""

import json
import mmap
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import tyro
from _report import Row, report, run_in_subprocess, write_json

from hymba_jax import cli
from hymba_jax.config import PRESETS
from hymba_jax.convert import convert as _  # noqa: F401 (a conversion does not wait for its import)
from hymba_jax.convert.hf_checkpoint import WEIGHTS
from hymba_jax.convert.hf_config import config_to_hf
from hymba_jax.convert.mapping import hf_shapes, hf_slices
from hymba_jax.convert.tensor_file import TensorFileWriter, TensorInfo
from hymba_jax.hf_files import HF_CONFIG
from hymba_jax.model.abstract import param_shapes


@dataclass(frozen=True)
class Args:
    """What to convert and where.

    Attributes:
      preset: the model.
      folder: where the files are written; a temporary one if absent.
      repeats: how often everything is measured, in turns; medians count.
      source, target: a conversion to measure in this process, with --row.
      row: only that conversion's row, into the JSON file.
      json: also written there.
    """

    preset: str = "hymba-1.5b"
    folder: str = ""
    repeats: int = 3
    source: str = ""
    target: str = ""
    row: bool = False
    json: Path | None = None


def run(args: Args) -> None:
    """Measures and prints the table."""
    if args.row:
        assert args.json is not None
        write_json([convert(args.source, args.target)], args.json)
        return
    with tempfile.TemporaryDirectory(dir=args.folder or None) as folder:
        hf, native = Path(folder, "hf"), Path(folder, "native")
        size = write_checkpoint(hf, args.preset)
        convert_apart(hf, native)
        calls: dict[str, Callable[[Path], Row]] = {
            "copying the file": partial(copy, hf),
            "HF to native": partial(convert_apart, hf),
            "native to HF": partial(convert_apart, native),
        }
        rows: dict[str, list[Row]] = {name: [] for name in calls}
        target = Path(folder, "target")
        for name, call in [*calls.items()] * args.repeats:
            rows[name].append(call(target))
            shutil.rmtree(target)
    table: list[Row] = []
    for name, measured in rows.items():
        speed = size / 1e9 / statistics.median(float(row["s"]) for row in measured)
        table.append(
            {
                "": name,
                "GB/s": speed,
                "of copying": speed / float(table[0]["GB/s"]) if table else 1.0,
                "peak MB": max(float(row["peak MB"]) for row in measured),
                "s": " ".join(f"{float(row['s']):.1f}" for row in measured),
            }
        )
    report(f"{args.preset} in bfloat16, {size / 1e9:.2f} GB", table, args.json)


def convert(source: str, target: str) -> Row:
    """Seconds of a conversion, and how far memory rose."""
    _touch_memory(source)
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    before = _memory("VmRSS")
    start = time.perf_counter()
    cli.convert([source, target])
    seconds = time.perf_counter() - start
    return {"s": seconds, "peak MB": (_memory("VmHWM") - before) / 1e6}


def _touch_memory(source: str | Path) -> None:
    """Has the machine's host provide twice what the files of a checkpoint take."""
    size = 2 * sum(file.stat().st_size for file in Path(source).rglob("*"))
    with mmap.mmap(-1, size) as memory:
        for page in range(0, size, mmap.PAGESIZE):
            memory[page] = 1


def _memory(kind: str) -> int:
    """Bytes of resident pages, mapped files included: now (VmRSS), or at most so far (VmHWM)."""
    status = Path("/proc/self/status").read_text()
    return next(
        1024 * int(line.split()[1]) for line in status.splitlines() if line.startswith(kind)
    )


def convert_apart(source: Path, target: Path) -> Row:
    """The same in a process of its own."""
    return run_in_subprocess(__file__, ["--source", str(source), "--target", str(target)])


def copy(source: Path, target: Path) -> Row:
    """Seconds of copying the weights' file to the disk."""
    target.mkdir()
    _touch_memory(source)
    start = time.perf_counter()
    shutil.copyfile(source / WEIGHTS, target / WEIGHTS)
    with (target / WEIGHTS).open("rb") as file:
        os.fsync(file.fileno())
    seconds = time.perf_counter() - start
    return {"s": seconds, "peak MB": 0}


def write_checkpoint(directory: Path, preset: str) -> int:
    """Writes an HF checkpoint of random weights. Returns their bytes."""
    config = PRESETS[preset]
    shapes = hf_shapes(
        hf_slices(param_shapes(config, scan_layers=False), config, scan_layers=False)
    )
    tensors = {name: TensorInfo("bfloat16", shape) for name, shape in shapes.items()}
    directory.mkdir()
    writer = TensorFileWriter(directory / WEIGHTS, tensors)
    rng = np.random.default_rng(0)
    for name, info in tensors.items():
        writer.write(name, 0, (0.02 * rng.normal(size=info.shape)).astype(info.dtype))
    (directory / HF_CONFIG).write_text(json.dumps(config_to_hf(config)))
    return sum(info.nbytes for info in tensors.values())


if __name__ == "__main__":
    run(tyro.cli(Args))
