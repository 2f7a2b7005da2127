"""Compiles the kernels of the selective scan ahead of time, no device needed.

python benchmarks/compile_scan.py [--target v5e v6e h100] [--json FILE]
"""

import os
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

# Before JAX starts: the accelerators' compilers are wanted, not the accelerators.
os.environ["JAX_PLATFORMS"] = "cpu"

import tyro
from _compile_gpu import compile_for_gpu
from _compile_tpu import compile_for_tpu
from _report import report, write_json
from _scan_passes import CHANNELS, STATE

TPUS = {"v5e": "v5e:2x2", "v6e": "v6e:2x2"}
Target = Literal["v5e", "v6e", "h100"]


def installed() -> tuple[Target, ...]:
    """The targets whose compilers are: extras `tpu` and `cuda13`."""
    tpu: tuple[Target, ...] = ("v5e", "v6e") if find_spec("libtpu") else ()
    gpu: tuple[Target, ...] = ("h100",) if find_spec("jax_cuda13_plugin") else ()
    return tpu + gpu


@dataclass(frozen=True)
class Options:
    """What to compile for, by default all whose packages are installed, and sizes."""

    target: tuple[Target, ...] = field(default_factory=installed)
    dtype: tuple[Literal["bfloat16", "float32"], ...] = ("bfloat16", "float32")
    length: tuple[int, ...] = (2048, 8192)
    batch: tuple[int, ...] = (1, 8)
    json: Path | None = None


def main(options: Options) -> None:
    tpus = [TPUS[name] for name in options.target if name in TPUS]
    sizes = (options.length, options.batch, options.dtype)
    # The CUDA plugin must be there before any other part of JAX starts.
    tables = {
        "H100": compile_for_gpu(*sizes) if "h100" in options.target else [],
        "TPU": compile_for_tpu(tpus, *sizes) if tpus else [],
    }
    for name, rows in tables.items():
        if rows:
            report(f"selective scan compiled for {name}, E={CHANNELS} N={STATE}", rows)
    if options.json is not None:
        write_json([row for rows in tables.values() for row in rows], options.json)


if __name__ == "__main__":
    main(tyro.cli(Options))
