"""The kernels of the selective scan compile for accelerators, at the size of Hymba-1.5B."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Of the schedules on TPUs: float32 matmuls take several of bfloat16.
MOST_CYCLES = {"bfloat16": (30, 76), "float32": (70, 290)}
COMPILERS = {"v5e": "libtpu", "v6e": "libtpu", "h100": "jax_cuda13_plugin"}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("target", COMPILERS)
def test_kernels_compile(target, dtype, tmp_path):
    if find_spec(COMPILERS[target]) is None:
        pytest.skip(f"{COMPILERS[target]}, the compiler for {target}, is not installed")
    file = tmp_path / "rows.json"
    command = [sys.executable, ROOT / "benchmarks/compile_scan.py", "--json", file]
    sizes = ["--length", "2048", "--batch", "1"]
    # In a process of its own: JAX and its compilers read the environment once.
    subprocess.run([*command, "--target", target, "--dtype", dtype, *sizes], check=True)
    rows = {row["pass"]: row for row in map(json.loads, file.read_text().splitlines())}
    assert list(rows) == ["inference", "training", "backward"]
    assert all(row["compiled"] == "yes" for row in rows.values())
    for name in ("inference", "training"):
        assert 1 <= rows[name]["HBM vs minimum"] < 1.15
        assert rows[name]["exponentials vs minimum"] == 1
    if target == "h100":
        assert all(row["spilled"] == 0 for row in rows.values())
        assert all(row["waves"] >= 1 for row in rows.values())
    else:
        assert all(row["of limit"] < 1 for row in rows.values())
        # Whose schedules are the better for some spilled registers.
        forward, backward = MOST_CYCLES[dtype]
        assert rows["training"]["cycles a position"] < forward
        assert rows["backward"]["cycles a position"] < backward
