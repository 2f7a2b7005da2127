"""A run that is killed and started again, however often, equals one that never stopped."""

import sys

import pytest
from entry.command import REPOSITORY, run


# Seed 4 is a SIGKILL, then a SIGTERM.
@pytest.mark.parametrize(("seed", "kills"), [(4, 2), pytest.param(1, 20, marks=pytest.mark.slow)])
def test_a_killed_run_equals_one_that_never_stopped(cache, seed, kills):
    """Up to 20 times; `benchmarks/soak.py` alone 200 times."""
    soak = [sys.executable, REPOSITORY / "benchmarks" / "soak.py"]
    result = run([*soak, "--kills", str(kills), "--seed", str(seed)], cache)
    assert result.returncode == 0, result.stderr
    assert " is equal" in result.stdout
    assert f"{kills} kills, " in result.stdout.splitlines()[-1]
