"""States that no device can hold are refused before they are allocated."""

import dataclasses
import re
from pathlib import Path
from unittest.mock import Mock

import jax
import pytest
from training.tiny import MODEL

from hymba_jax import host
from hymba_jax.checkpoint.train_state import abstract_train_state
from hymba_jax.config import ComputeConfig
from hymba_jax.config.parallel import ParallelConfig
from hymba_jax.config.training import TrainingConfig
from hymba_jax.errors import HymbaError
from hymba_jax.host import host_memory
from hymba_jax.parallel.memory import device_memory
from hymba_jax.parallel.mesh import make_mesh
from hymba_jax.training.capacity import check_memory
from hymba_jax.training.optimizer import make_optimizer

# 2^24 rows of 2^14 channels: 2^38 parameters, of 4 bytes and as much again for two moments each;
# 3,298 GB, and a little more for the layers.
HUGE = dataclasses.replace(MODEL, vocab_size=2**24, hidden_size=2**14)
BYTES = 2**38 * 12


def abstract(config, mesh):
    optimizer = make_optimizer(TrainingConfig())
    return abstract_train_state(config, ComputeConfig(), optimizer, mesh)


def test_a_model_that_fits_is_not_refused():
    mesh = make_mesh(jax.devices()[:8])
    check_memory(abstract(MODEL, mesh), mesh)


def test_what_is_larger_than_the_host_is_refused(monkeypatch):
    mesh = make_mesh(jax.devices()[:8], ParallelConfig(data=8, fsdp=1))
    for module in ("parallel.memory", "training.capacity"):
        monkeypatch.setattr(f"hymba_jax.{module}.host_memory", lambda: 16 * 10**9)
    with pytest.raises(HymbaError) as caught:
        check_memory(abstract(HUGE, mesh), mesh)
    message = str(caught.value)
    assert re.search(r"optimizer state take 3,[23]\d\d\.\d GB on each device", message)
    assert "a cpu has 2.0 GB, its share of 16.0 GB of host memory" in message
    assert message.endswith(": choose a smaller model")


def test_only_the_shard_of_a_device_counts(monkeypatch):
    """Parameters and moments are 8 times as large as what each of 8 devices holds of them."""
    one, eight = (make_mesh(jax.devices()[:n]) for n in (1, 8))
    monkeypatch.setattr("hymba_jax.training.capacity.device_memory", lambda _: BYTES // 4)
    check_memory(abstract(HUGE, eight), eight)
    with pytest.raises(HymbaError, match=r"3,[23]\d\d\.\d GB on each device"):
        check_memory(abstract(HUGE, one), one)


def test_a_teacher_counts(monkeypatch):
    """Its parameters, 4 bytes each, where the state has 12."""
    mesh = make_mesh(jax.devices()[:1])
    state = abstract(HUGE, mesh)
    monkeypatch.setattr("hymba_jax.training.capacity.device_memory", lambda _: BYTES * 5 // 4)
    check_memory(state, mesh)
    with pytest.raises(HymbaError, match=r"teacher's parameters, take 4,[34]\d\d\.\d GB"):
        check_memory(state, mesh, state.state.params)


@pytest.mark.parametrize(
    ("stats", "expected"), [([{"bytes_limit": 8}, {"bytes_limit": 6}], 6), ([None, {}], None)]
)
def test_accelerators_say_what_they_have(stats, expected):
    devices = [Mock(jax.Device, platform="gpu", memory_stats=Mock(return_value=s)) for s in stats]
    assert device_memory(devices) == expected


def test_the_memory_of_the_host(monkeypatch, tmp_path):
    """All that Linux has, unless the container may use less."""
    total = next(
        int(line.split()[1]) * 1024
        for line in Path("/proc/meminfo").read_text().splitlines()
        if line.startswith("MemTotal")
    )
    monkeypatch.setattr(host, "_CGROUP_LIMITS", (tmp_path / "limit", tmp_path / "gone"))
    assert host_memory() == total
    for text, expected in (("max", total), ("1048576", 2**20), (str(2**63), total), ("", total)):
        (tmp_path / "limit").write_text(f"{text}\n")
        assert host_memory() == expected
