"""The kernels of the selective scan compile for accelerators, at the size of Hymba-1.5B."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
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
    # The schedule of a TPU's backward pass is the better for some.
    allowed = {"backward": 2**16} if target != "h100" else {}
    for name, row in rows.items():
        assert row["compiled"] == "yes"
        assert row["spilled"] <= allowed.get(name, 0)
    for name in ("inference", "training"):
        assert 1 <= rows[name]["HBM vs minimum"] < 1.15
        assert rows[name]["exponentials vs minimum"] == 1
    if target == "h100":
        assert all(row["waves"] >= 1 for row in rows.values())
    else:
        assert all(row["of limit"] < 1 for row in rows.values())
