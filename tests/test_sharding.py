"""Training on 8 devices equals training on one, in losses and in parameters."""

import jax
import numpy as np
import pytest
from flax import nnx

from hymba_jax.config import AttentionConfig, ComputeConfig, HymbaConfig
from hymba_jax.sharding import batch_sharding, make_mesh, state_shardings
from hymba_jax.training.config import TrainingConfig
from hymba_jax.training.optimizer import make_optimizer
from hymba_jax.training.state import init_state, make_template
from hymba_jax.training.step import make_train_step

CONFIG = HymbaConfig(
    vocab_size=61,
    hidden_size=32,
    mlp_size=48,
    layers="G 2*Ww",
    attention=AttentionConfig(num_heads=4, num_kv_heads=2, window=8, rope_type="default"),
    num_meta_tokens=3,
)
TRAINING = TrainingConfig(steps=3, batch_size=8, warmup_fraction=0.0, decay_fraction=0.0)


def train(devices):
    mesh = make_mesh(devices)
    with jax.set_mesh(mesh):
        return train_on(mesh)


def train_on(mesh):
    optimizer = make_optimizer(TRAINING)
    template = make_template(CONFIG, ComputeConfig(), optimizer, mesh)
    state = init_state(CONFIG, ComputeConfig(), optimizer, template, seed=0)
    step = jax.jit(
        make_train_step(template.graph, optimizer, micro_batch_size=8),
        out_shardings=(template.shardings, None),
    )
    rng = np.random.default_rng(0)
    losses = []
    for _ in range(TRAINING.steps):
        tokens = rng.integers(3, 61, (8, 25))
        batch = {"inputs": tokens[:, :-1], "targets": tokens[:, 1:]}
        state, metrics = step(state, jax.device_put(batch, batch_sharding(mesh)))
        losses.append(metrics.loss)
    return losses, state.params


@pytest.fixture(scope="module")
def on_one():
    return train(jax.devices()[:1])


@pytest.fixture(scope="module")
def on_eight():
    return train(jax.devices()[:8])


def test_losses_agree(on_one, on_eight):
    np.testing.assert_allclose(on_eight[0], on_one[0], rtol=1e-5)


def test_parameters_agree(on_one, on_eight):
    """Adam divides by the gradient's size, so rounding of a tiny gradient can move a parameter by
    a part of the learning rate of 3e-3; a wrong gradient moves most of them by all of it."""
    one, eight = (jax.tree.leaves(params) for _, params in (on_one, on_eight))
    for ours, theirs in zip(eight, one, strict=True):
        difference = np.abs(np.asarray(ours) - np.asarray(theirs))
        assert difference.mean() < 1e-5
        assert difference.max() < 3e-3


def test_each_device_holds_its_part(on_eight):
    kernel = on_eight[1]["segments"][1]["units"]["blocks"][0]["mlp"]["up_proj"]["kernel"]
    assert kernel.shape == (2, 32, 48)
    assert {shard.data.shape for shard in kernel.addressable_shards} == {(2, 4, 48)}


def test_what_the_mesh_does_not_divide_is_replicated():
    params = {"odd": nnx.Param(np.zeros((12, 7)), axes=("hidden", "mlp")), "count": np.zeros(3)}
    placed = state_shardings(params, make_mesh(jax.devices()[:8]))
    assert all(sharding.is_fully_replicated for sharding in placed.values())
