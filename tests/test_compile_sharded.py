"""A training step compiles for a slice of TPUs, at the widths of Hymba-1.5B."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.skipif(find_spec("libtpu") is None, reason="libtpu, the compiler, is not installed")
def test_kernels_compile_for_their_part(tmp_path):
    """On fsdp 2 x tensor 2: half of 2 rows, half of 3200 channels, all of 25 heads."""
    file = tmp_path / "rows.json"
    command = [sys.executable, ROOT / "benchmarks/compile_train_step.py", "--json", file]
    # In a process of its own: JAX and its compilers read the environment once.
    subprocess.run(command, check=True)
    row = json.loads(file.read_text())
    assert {*row["scan_forward"].split()} == {"bf16[1,2048,1600]"}
    assert row["scan_backward"] == "bf16[1,2048,1600]"
    assert row["splash"].startswith("bf16[25,2048,128] ")
    assert row["all-reduce-scatter"] > 0
