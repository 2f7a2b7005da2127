"""Losses that do not depend on the number of devices."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from entry.command import read_metrics, run, train_py, write_config
from slow import slow_but
from training.tiny import COMPUTE, MODEL

from hymba_jax.checkpoint.train_state import abstract_train_state, init_state
from hymba_jax.config.data import DataConfig
from hymba_jax.config.parallel import ParallelConfig
from hymba_jax.config.run import RunConfig
from hymba_jax.config.training import TrainingConfig
from hymba_jax.data import Batch
from hymba_jax.errors import HymbaError
from hymba_jax.parallel.mesh import batch_sharding, make_mesh
from hymba_jax.training.fixed_order import in_fixed_order
from hymba_jax.training.loss import next_token_loss
from hymba_jax.training.optimizer import make_optimizer
from hymba_jax.training.step import check_batch, compile_train_step, run_step

LENGTH = 8  # twice the window
TOKENS = np.random.default_rng(0).integers(0, 61, (3, 8, LENGTH + 1)).astype(np.int32)


@functools.cache
def train(layers: str, num_devices: int, reduction_shards: int):
    """The state and each step's loss, after three steps of Muon, clipped, with an average."""
    training = TrainingConfig(
        batch_size=8,
        optimizer="muon",
        reduction_shards=reduction_shards,
        ema_decay=0.9,
        warmup_fraction=0.0,
    )
    model = dataclasses.replace(MODEL, layers=layers)
    run = RunConfig(model=model, data=DataConfig(sequence_length=LENGTH), training=training)
    mesh = make_mesh(jax.devices()[:num_devices], ParallelConfig(data=-1, fsdp=1))
    optimizer = make_optimizer(training)
    with jax.set_mesh(mesh):
        abstract = abstract_train_state(model, COMPUTE, optimizer, mesh)
        step, batch = run_step(run, next_token_loss, abstract.graph, optimizer, mesh)
        compiled = compile_train_step(step, abstract.state, batch)
        state = init_state(model, COMPUTE, optimizer, abstract, seed=3)
        losses = []
        for tokens in TOKENS:
            rows = Batch(tokens[:, :-1], tokens[:, 1:].copy())
            state, metrics = compiled(state, jax.device_put(rows, batch_sharding(mesh)))
            losses.append(float(metrics["loss"].mean))
    return jax.tree.map(np.asarray, state), losses


# Layers with attention alone compile in half the time.
@pytest.mark.parametrize(
    ("layers", "num_devices"),
    slow_but([("2*W", 2), ("2*W", 4), ("2*W", 8), ("2*L", 8)], ("2*L", 8)),
)
def test_state_and_losses_have_the_same_bits_on_any_number_of_devices(layers, num_devices):
    state, losses = train(layers, num_devices, reduction_shards=8)
    expected, expected_losses = train(layers, 1, reduction_shards=8)
    assert losses == expected_losses
    jax.tree.map(np.testing.assert_array_equal, state, expected)


@pytest.mark.parametrize("layers", slow_but(["2*W", "2*L"], "2*L"))
def test_losses_are_those_of_the_batch_as_a_whole(layers):
    """The third follows two updates, so they are compared, too."""
    _, losses = train(layers, 1, reduction_shards=0)
    _, expected = train(layers, 1, reduction_shards=8)
    assert losses == pytest.approx(expected, rel=1e-5)  # float32 sums in another order


def test_shards_are_added_in_the_order_of_the_batch():
    """Sums of float32 whose value depends on the order, of sizes that devices do not divide."""
    values = np.float32([1e8, 3.3, -1e8, 7.7, 1e-3, 1e8, 2.2, -1e8])
    weights = np.float32([1.0, 0.7, 1.3])
    expected = np.zeros(3, np.float32)
    for value in values:
        expected += value * weights
    batch = Batch(jnp.asarray(values)[:, None], jnp.zeros((8, 1), jnp.int32))
    total_of = in_fixed_order(lambda params, rows: rows.inputs.sum() * params["w"], num_shards=8)
    for num_devices in (1, 2, 8):
        with jax.set_mesh(make_mesh(jax.devices()[:num_devices])):
            total = jax.jit(total_of)({"w": jnp.asarray(weights)}, batch)
        np.testing.assert_array_equal(total, expected)


def test_a_shard_is_compiled_by_itself_whatever_the_number_of_rounds():
    """In a loop, whose body XLA does not mix with what is around it: 8 devices have one round."""
    batch = Batch(jnp.ones((8, 4)), jnp.zeros((8, 4), jnp.int32))
    total_of = in_fixed_order(
        lambda params, rows: jnp.tanh(rows.inputs @ params["w"]), num_shards=8
    )
    for num_devices in (1, 8):
        with jax.set_mesh(make_mesh(jax.devices()[:num_devices])):
            compiled = jax.jit(total_of).lower({"w": jnp.ones((4, 4))}, batch).compile()
        loops = re.findall(r"\) while\(", compiled.as_text())
        assert len(loops) == 2  # over the rounds, and around a shard


@pytest.mark.slow
def test_runs_in_processes_of_their_own_have_the_same_metrics(tmp_path):
    """As they are compiled for people, where how operations are fused decides how they round."""
    found = []
    config = write_config(tmp_path, tmp_path / "run", layers="W")
    fixed = ("--training.reduction-shards", "8", "--parallel.data", "-1", "--parallel.fsdp", "1")
    longer = ("--training.steps", "12", "--training.sample-tokens", "0")
    for num_devices in (1, 2, 8):
        output = tmp_path / str(num_devices)
        command = train_py("--config", config, "--output", output, *fixed, *longer)
        devices = f"XLA_FLAGS=--xla_force_host_platform_device_count={num_devices}"
        compiler = "JAX_DISABLE_MOST_OPTIMIZATIONS=0"
        result = run(command, tmp_path / "cache", ("env", devices, compiler))
        assert result.returncode == 0, result.stderr
        found.append(read_metrics(output))
    assert found[1] == found[0]
    assert found[2] == found[0]


@pytest.mark.parametrize(
    ("parallel", "shards", "message"),
    [
        ({}, 8, "reduction_shards needs all devices along data"),
        ({"data": 4, "fsdp": 1, "tensor": 2}, 8, "needs all devices along data"),
        ({"data": 8, "fsdp": 1}, 4, "reduction_shards is 4, which 8 devices cannot share equally"),
    ],
)
def test_shards_that_a_mesh_cannot_compute_are_refused(parallel, shards, message):
    training = TrainingConfig(batch_size=16, reduction_shards=shards)
    with pytest.raises(HymbaError, match=message):
        check_batch(training, make_mesh(parallel=ParallelConfig(**parallel)))
