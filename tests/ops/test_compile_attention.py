"""Attention compiles for accelerators, at the size of Hymba-1.5B."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def rows(target, compiler, dtype, tmp_path, table=None):
    """Two layers, two passes each, of one long sequence; of a target's table of this name."""
    if find_spec(compiler) is None:
        pytest.skip(f"{compiler}, the compiler for {target}, is not installed")
    file = tmp_path / "rows.json"
    command = [sys.executable, ROOT / "benchmarks/compile_attention.py", "--json", file]
    sizes = ["--model", "1.5B", "--length", "8192", "--batch", "1"]
    # In a process of its own: JAX and its compilers read the environment once.
    subprocess.run([*command, "--target", target, "--dtype", dtype, *sizes], check=True)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows = [row for row in rows if row["target"] == (table or target)]
    assert {(row["layer"], row["pass"]) for row in rows} == {
        (layer, name) for layer in ("window", "global") for name in ("forward", "training")
    }
    for row in rows:
        assert row["compiled"] == "yes"
        assert row["temporary MB"] < row["scores MB"] / 10
    return rows


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("target", ["v5e", "v6e"])
def test_kernels_compile(target, dtype, tmp_path):
    for row in rows(target, "libtpu", dtype, tmp_path):
        assert row["kernels"] == {"forward": 1, "training": 2}[row["pass"]]
        assert row["VMEM MiB"] < 50  # of the 100 that a kernel may have, for up to 4 times the keys


@pytest.mark.slow
def test_gpu_kernels_compile(tmp_path):
    for row in rows("h100", "jax_cuda13_plugin", "bfloat16", tmp_path):
        assert row["kernels"] == {"forward": 1, "training": 3}[row["pass"]]
        assert row["registers"] <= 255
        assert row["spilled"] == 0
        assert row["shared KiB"] <= 227  # of a thread block


@pytest.mark.slow
def test_cudnn_is_asked_for_what_it_does(tmp_path):
    for row in rows("h100", "jax_cuda13_plugin", "bfloat16", tmp_path, "h100, cuDNN"):
        passes = {"forward": 1, "training": 2}[row["pass"]]
        assert row["causal calls"] == passes
        assert row["masked calls"] == passes * (row["layer"] == "window")
