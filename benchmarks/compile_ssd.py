"""Compiles the kernels of SSD ahead of time, no device needed.

python benchmarks/compile_ssd.py [--target v5e v6e h100] [--json FILE]

What is printed for TPUs: `_compile_ssd_tpu.py`; for an H100, of the 1B in bfloat16:
`_compile_ssd_gpu.py`.
"""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

# Before JAX starts: the accelerators' compilers are wanted, not the accelerators.
os.environ["JAX_PLATFORMS"] = "cpu"

import tyro
from _compile_ssd_gpu import compile_ssd_for_gpu
from _compile_ssd_tpu import compile_ssd_for_tpus
from _report import report, write_json
from compile_scan import TPUS, Target, installed


@dataclass(frozen=True)
class Options:
    """What to compile for, by default all whose packages are installed, and sizes.

    Attributes:
      model, dtype: for TPUs.
    """

    target: tuple[Target, ...] = field(default_factory=installed)
    model: tuple[Literal["300M", "1B"], ...] = ("300M", "1B")
    dtype: tuple[Literal["bfloat16", "float32"], ...] = ("bfloat16", "float32")
    length: tuple[int, ...] = (2048,)
    batch: tuple[int, ...] = (8,)
    documents: tuple[bool, ...] = (False, True)
    json: Path | None = None


def main(options: Options) -> None:
    sizes = (options.documents, options.length, options.batch)
    tpus = [target for target in options.target if target in TPUS]
    tables = {}
    # The CUDA plugin must be there before any other part of JAX starts.
    if "h100" in options.target:
        tables["an H100"] = compile_ssd_for_gpu(*sizes)
    if tpus:
        tables["TPU"] = compile_ssd_for_tpus(tpus, options.model, options.dtype, *sizes)
    for target, rows in tables.items():
        report(f"SSD compiled for {target}", rows)
    if options.json is not None:
        write_json([row for rows in tables.values() for row in rows], options.json)


if __name__ == "__main__":
    main(tyro.cli(Options))
