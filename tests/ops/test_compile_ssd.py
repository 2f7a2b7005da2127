"""The kernels of SSD compile for accelerators, at the size of a Mamba2 layer of 1B."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.skipif(find_spec("libtpu") is None, reason="libtpu, the compiler, is not installed")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("target", ["v5e", "v6e"])
def test_kernels_compile(target, dtype, tmp_path):
    file = tmp_path / "rows.json"
    command = [sys.executable, ROOT / "benchmarks/compile_ssd.py", "--json", file]
    sizes = ["--model", "1B", "--length", "2048", "--batch", "1"]
    # In a process of its own: JAX and its compilers read the environment once.
    subprocess.run([*command, "--target", target, "--dtype", dtype, *sizes], check=True)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["pass"] for row in rows] == ["inference", "training", "backward"] * 2
    for row in rows:
        assert row["compiled"] == "yes"
        assert row["of limit"] < 1
        assert 1 <= row["HBM vs minimum"] < 1.1


@pytest.mark.slow
@pytest.mark.skipif(not find_spec("jax_cuda13_plugin"), reason="no compiler for GPUs is installed")
def test_gpu_kernels_compile(tmp_path):
    file = tmp_path / "rows.json"
    command = [sys.executable, ROOT / "benchmarks/compile_ssd.py", "--json", file]
    # In a process of its own: JAX and its compilers read the environment once.
    subprocess.run([*command, "--target", "h100", "--batch", "1"], check=True)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert all(row["compiled"] == "yes" for row in rows)
    kernels = [row for row in rows if row["kernel"] != "all"]
    assert len(kernels) == 2 * (1 + 4)  # with documents and without, inference and training
    for row in kernels:
        assert row["registers"] <= 255
        assert row["spilled"] == 0
        assert row["shared KiB"] <= 227  # of a thread block
    for row in rows:
        if row["kernel"] == "all":  # besides inputs and outputs, at most the states between chunks
            assert row["HBM vs minimum"] < {"inference": 1.5, "training": 6}[row["pass"]]
