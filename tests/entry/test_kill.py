"""A run that is killed and started again, however often, equals one that never stopped."""

import sys

import pytest
from entry.command import REPOSITORY, run
from slow import slow_but

# Seed 4 is a SIGKILL, then a SIGTERM.
QUICK = ("pretraining", 4, 2, "L")


@pytest.mark.parametrize(
    ("recipe", "seed", "kills", "layers"),
    slow_but([QUICK, ("pretraining", 1, 20, "W"), ("fine-tuning", 3, 6, "L")], QUICK),
)
def test_a_killed_run_equals_one_that_never_stopped(cache, recipe, seed, kills, layers):
    """Up to 20 times; `benchmarks/soak.py` alone 200 times."""
    soak = [sys.executable, REPOSITORY / "benchmarks" / "soak.py", "--recipe", recipe]
    options = ["--kills", str(kills), "--seed", str(seed), "--layers", layers]
    result = run([*soak, *options], cache)
    assert result.returncode == 0, result.stderr
    assert " is equal" in result.stdout
    assert f"{kills} kills, " in result.stdout.splitlines()[-1]
