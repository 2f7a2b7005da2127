"""Decoding compiles for accelerators at the size of Hymba-1.5B, and keeps its cache in place."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMPILERS = {"v5e": "libtpu", "v6e": "libtpu", "h100": "jax_cuda13_plugin"}
KEY_VALUE_GB = 128 * 74.7e6 / 1e9


def compiled_step(target, directory, *options):
    """The row of a decoding step that is compiled in a process of its own, as JAX and its compilers
    read the environment once."""
    if find_spec(COMPILERS[target]) is None:
        pytest.skip(f"{COMPILERS[target]}, the compiler for {target}, is not installed")
    file = directory / "rows.json"
    command = [sys.executable, ROOT / "benchmarks/compile_decode.py", "--json", file]
    shared = ["--target", target, "--prompts", "0", "--no-search"]
    subprocess.run([*command, *shared, *options], check=True)
    (row,) = map(json.loads, file.read_text().splitlines())
    return row


@pytest.mark.slow
@pytest.mark.parametrize("target", COMPILERS)
def test_decode_fits(target, tmp_path):
    row = compiled_step(target, tmp_path, "--batch", "128", "--state-dtype", "bfloat16")
    assert row["fits"] == "yes"
    assert row["donated"] > KEY_VALUE_GB  # the whole cache is updated where it is
    assert row["copied"] < row["minimum"] / 100
    assert row["minimum"] <= row["HBM GB per step"] < 2.2 * row["minimum"]


@pytest.mark.slow
@pytest.mark.parametrize("formats", [(), ("--weights", "int8", "--kv-cache", "int8")])
@pytest.mark.parametrize("batch", [1, 16, 40, 128])
def test_few_kernels_are_started(batch, formats, tmp_path):
    """Those of `ops/layer_step`, and those that round keys and values to 8 bits."""
    options = ("--batch", str(batch), "--state-dtype", "float32", *formats)
    row = compiled_step("h100", tmp_path, *options)
    assert row["kernels"] < (300 if batch <= 32 else 400) + (120 if formats else 0)
    assert row["HBM GB per step"] < 1.4 * row["minimum"]
