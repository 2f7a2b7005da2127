"""What `--profile` writes."""

import gzip
import json

import jax
import jax.numpy as jnp
import pytest

from hymba_jax.errors import HymbaError
from hymba_jax.training.profile import Tracer


def run(directory, steps, error=None):
    with Tracer(directory, start=10, stop=10 + steps) as tracer:
        for step in range(11, 11 + steps):
            with tracer.step(step):
                jax.block_until_ready(jnp.ones(3) + step)
        if error is not None:
            raise error


@pytest.mark.parametrize("steps", [1, 2, 5, 20])
def test_a_few_steps_are_traced(tmp_path, steps):
    """Also if the run ends among them, or before; then it is the last."""
    run(tmp_path, steps)
    assert len(list(tmp_path.rglob("*.xplane.pb"))) == 1  # what XProf opens
    (events,) = tmp_path.rglob("*.trace.json.gz")  # the same, in part
    events = json.loads(gzip.decompress(events.read_bytes()))["traceEvents"]
    traced = [int(event["args"]["step_num"]) for event in events if event.get("name") == "train"]
    assert traced == [*range(min(13, 10 + steps), min(11 + steps, 18))]


def test_a_trace_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    directory = tmp_path / "file" / "profile"
    with pytest.raises(HymbaError) as caught:
        run(directory, 5)
    assert str(caught.value).startswith(f"{directory}: the profile cannot be written (")
    with pytest.raises(HymbaError, match="diverged"):  # the first error is told
        run(directory, 5, HymbaError("diverged"))


def test_nothing_is_traced_unless_asked_for(tmp_path):
    run(None, 20)
    assert not any(tmp_path.iterdir())
