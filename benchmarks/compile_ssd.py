"""Compiles the kernels of SSD ahead of time, no device needed.

python benchmarks/compile_ssd.py [--target h100] [--json FILE]
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

# Before JAX starts: the accelerators' compilers are wanted, not the accelerators.
os.environ["JAX_PLATFORMS"] = "cpu"

import tyro
from _compile_ssd_gpu import GROUPS, HEAD_DIM, HEADS, STATE, compile_ssd_for_gpu
from _report import Row, report, write_json


@dataclass(frozen=True)
class Options:
    """What to compile for, and sizes."""

    target: tuple[Literal["h100"], ...] = ("h100",)
    length: tuple[int, ...] = (2048,)
    batch: tuple[int, ...] = (1, 8)
    documents: tuple[bool, ...] = (False, True)
    json: Path | None = None


def main(options: Options) -> None:
    rows: list[Row] = []
    if "h100" in options.target:
        rows += compile_ssd_for_gpu(options.length, options.batch, options.documents)
    report(f"SSD compiled, {HEADS} heads of {HEAD_DIM}, G={GROUPS} N={STATE}", rows)
    if options.json is not None:
        write_json(rows, options.json)


if __name__ == "__main__":
    main(tyro.cli(Options))
