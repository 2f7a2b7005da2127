"""States that no device can hold are refused before they are allocated."""

import dataclasses
import os
import re
from pathlib import Path
from unittest.mock import Mock

import jax
import pytest
from jax.sharding import Mesh
from training.tiny import MODEL

from hymba_jax import host
from hymba_jax.checkpoint.train_state import abstract_train_state
from hymba_jax.config import ComputeConfig
from hymba_jax.config.parallel import ParallelConfig
from hymba_jax.config.training import TrainingConfig
from hymba_jax.errors import HymbaError
from hymba_jax.host import available_memory, host_memory
from hymba_jax.model.trainable import Trainable
from hymba_jax.parallel.memory import device_memory
from hymba_jax.parallel.mesh import make_mesh
from hymba_jax.training.capacity import check_memory
from hymba_jax.training.optimizer import make_optimizer

# 2^24 rows of 2^14 channels: 2^38 parameters, of 4 bytes and as much again for a gradient and two
# moments each; 4,398 GB, and a little more for the layers.
HUGE = dataclasses.replace(MODEL, vocab_size=2**24, hidden_size=2**14)
BYTES = 2**38 * 16


def abstract(config, mesh):
    optimizer = make_optimizer(TrainingConfig())
    return abstract_train_state(config, ComputeConfig(), optimizer, mesh)


def test_a_model_that_fits_is_not_refused():
    mesh = make_mesh(jax.devices()[:8])
    check_memory(abstract(MODEL, mesh), mesh)


def test_what_is_larger_than_the_host_is_refused(monkeypatch):
    mesh = make_mesh(jax.devices()[:8], ParallelConfig(data=8, fsdp=1))
    monkeypatch.setattr("hymba_jax.training.capacity.available_memory", lambda: 16 * 10**9)
    with pytest.raises(HymbaError) as caught:
        check_memory(abstract(HUGE, mesh), mesh)
    message = str(caught.value)
    assert re.search(r"optimizer state take 4,[34]\d\d\.\d GB on each device", message)
    assert "a cpu has 2.0 GB, its share of 16.0 GB of available host memory" in message
    assert message.endswith(": choose a smaller model")


def test_what_is_larger_than_an_accelerator_is_refused(monkeypatch):
    mesh = make_mesh(jax.devices()[:1])
    state = abstract(HUGE, mesh)
    chip = Mock(jax.Device, platform="tpu", device_kind="TPU v5 lite")
    for memory, refused in ((None, False), (2 * BYTES, False), (16 * 10**9, True)):
        chip.memory_stats = Mock(return_value=memory and {"bytes_limit": memory})
        if not refused:
            check_memory(state, Mock(Mesh, local_devices=[chip]))
            continue
        with pytest.raises(HymbaError, match=r"a TPU v5 lite has 16\.0 GB: .* by parallel\.fsdp"):
            check_memory(state, Mock(Mesh, local_devices=[chip]))


def test_only_the_shard_of_a_device_counts(monkeypatch):
    """The state is 8 times as large as what each of 8 devices holds of it."""
    one, eight = (make_mesh(jax.devices()[:n]) for n in (1, 8))
    monkeypatch.setattr("hymba_jax.training.capacity.available_memory", lambda: 2 * BYTES)
    check_memory(abstract(HUGE, eight), eight)
    monkeypatch.setattr("hymba_jax.training.capacity.available_memory", lambda: BYTES // 4)
    with pytest.raises(HymbaError, match=r"4,[34]\d\d\.\d GB on each device"):
        check_memory(abstract(HUGE, one), one)


def test_a_teacher_counts(monkeypatch):
    """Its parameters, 4 bytes each, where the state and its gradients have 16."""
    mesh = make_mesh(jax.devices()[:1])
    state = abstract(HUGE, mesh)
    monkeypatch.setattr("hymba_jax.training.capacity.available_memory", lambda: BYTES * 9 // 8)
    check_memory(state, mesh)
    with pytest.raises(HymbaError, match=r"teacher's parameters, take 5,[45]\d\d\.\d GB"):
        check_memory(state, mesh, state.state.params)


def test_only_what_is_trained_has_gradients(monkeypatch):
    """Of the frozen embedding there are parameters alone, 4 bytes each."""
    mesh = make_mesh(jax.devices()[:1])
    optimizer = make_optimizer(TrainingConfig())
    frozen = Trainable(freeze=("embedding",))
    state = abstract_train_state(HUGE, ComputeConfig(), optimizer, mesh, frozen)
    monkeypatch.setattr("hymba_jax.training.capacity.available_memory", lambda: BYTES // 2)
    check_memory(state, mesh)


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


def test_the_memory_that_other_programs_leave(monkeypatch, tmp_path):
    """That of a system that does not say it is all of it."""
    monkeypatch.setattr(host, "host_memory", lambda: 2**30)
    monkeypatch.setattr(host, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(host, "_STATM", tmp_path / "statm")
    (tmp_path / "statm").write_text("9 3 2 1 0 5 0\n")  # 3 resident pages
    own = 3 * os.sysconf("SC_PAGE_SIZE")
    assert available_memory() == 2**30
    for available, expected in ((2**19, 2**29 + own), (2**21, 2**30)):  # KiB, and bytes
        text = f"MemTotal: {2**22} kB\nMemFree: 7 kB\nMemAvailable: {available} kB\n"
        (tmp_path / "meminfo").write_text(text)
        assert available_memory() == expected
