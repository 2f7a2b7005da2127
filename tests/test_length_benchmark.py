"""`benchmarks/length.py`: what it shows of what has been measured."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "length.py"


def test_only_the_lengths_that_were_asked_for_are_shown(tmp_path):
    """In the table, and in a picture beside the results."""
    rows = [
        {"target": "cpu", "design": "01_mamba", "length": n, "prefill s": 1.0, "decode ms": 2.0}
        for n in (1024, 2048, 4096)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--designs", "01_mamba", "--target", "cpu", "--lengths", "1024", "4096"]
    options += ["--output", "rows.jsonl"]
    command = [sys.executable, SCRIPT, *options]
    shown = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert [length in shown for length in ("1024", "2048", "4096")] == [True, False, True]
    assert (tmp_path / "length.png").stat().st_size > 10_000
