import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from training.tiny import COMPUTE, MODEL

from hymba_jax.data import IGNORED_TARGET, Batch
from hymba_jax.model import Hymba
from hymba_jax.training.loss import Average, add_averages, means, next_token_loss


def test_a_z_loss_is_part_of_the_loss_and_not_of_the_cross_entropy():
    """From the logits of an untied model in float64, over 9 of 14 positions."""
    config = dataclasses.replace(MODEL, layers="W", num_meta_tokens=0, tie_embeddings=False)
    model = Hymba(config, COMPUTE, nnx.Rngs(0))
    rng = np.random.default_rng(0)
    tokens, targets = rng.integers(0, MODEL.vocab_size, (2, 2, 7)).astype(np.int32)
    targets[1, 2:] = IGNORED_TARGET

    @jax.jit
    def run(inputs, targets):
        return model(inputs), next_token_loss(model, Batch(inputs, targets), z_loss=0.1)

    logits, averages = run(tokens, targets)
    exact = np.asarray(logits, np.float64)
    log_z = np.log(np.exp(exact).sum(-1))
    valid = targets != IGNORED_TARGET
    picked = np.take_along_axis(exact, np.where(valid, targets, 0)[..., None], -1)[..., 0]
    nats, z_loss = (log_z - picked)[valid].sum(), 0.1 * (log_z[valid] ** 2).sum()
    assert {int(average.weight) for average in averages.values()} == {9}
    totals = {name: float(average.total) for name, average in averages.items()}
    # Rounding of float32.
    assert totals == pytest.approx({"loss": nats + z_loss, "cross_entropy": nats}, rel=1e-6)


def test_averages_of_unequal_batches_add_up_to_that_of_all():
    """2 + 4 over three tokens, and 9 over one: 15 / 4; an average over nothing has no mean."""
    batches = [
        {"loss": Average(jnp.float32(6), jnp.int32(3)), "none": Average(jnp.float32(0), 0)},
        {"loss": Average(jnp.float32(9), jnp.int32(1)), "new": Average(jnp.float32(1), 2)},
    ]
    assert means(add_averages(batches)) == {"loss": 3.75, "new": 0.5}
