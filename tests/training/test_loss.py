import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from data.test_conversation_rows import END, make_store
from flax import nnx
from training.tiny import COMPUTE, MODEL

from hymba_jax.data import IGNORED_TARGET, Batch
from hymba_jax.data.batch import stack_rows
from hymba_jax.data.conversation_rows import ConversationRows
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


def test_packed_conversations_are_trained_as_each_alone():
    """Loss and gradient: the mean over the answers' tokens, of all conversations alone."""
    rng = np.random.default_rng(3)
    conversations = []
    for length, answers in ((11, [4, 5, 10]), (8, [1, 7]), (5, [3, 4]), (14, [2, 3, 13])):
        tokens = np.append(rng.integers(3, MODEL.vocab_size, length - 1), END).astype(np.uint16)
        conversations.append((tokens, np.isin(np.arange(length), answers)))
    rows = ConversationRows(make_store(conversations), 20)
    batch = stack_rows([rows[index] for index in range(len(rows))])
    assert batch.segment_ids.max(axis=1).tolist() == [2, 2]
    config = dataclasses.replace(MODEL, layers="L")  # of hybrid layers tests/model says so
    graph, params = nnx.split(Hymba(config, COMPUTE, nnx.Rngs(0)))

    @jax.jit
    @jax.value_and_grad
    def packed(params, batch):
        return next_token_loss(nnx.merge(graph, params), Batch(*batch))["loss"].mean

    @jax.jit
    @jax.value_and_grad
    def alone(params, tokens, mask):
        logits = nnx.merge(graph, params)(tokens[None, :-1])[0]
        log_probs = jax.nn.log_softmax(logits)[jnp.arange(len(tokens) - 1), tokens[1:]]
        return -jnp.sum(log_probs * mask[1:])

    loss, gradient = packed(params, batch)
    total, gradients, count = 0.0, [], 0
    for tokens, mask in conversations:
        behind = (0, 16 - len(tokens))  # one program for all: what follows changes nothing
        nats, own = alone(params, np.pad(tokens.astype(np.int32), behind), np.pad(mask, behind))
        total, count = total + float(nats), count + int(mask.sum())
        gradients.append(own)
    assert float(loss) == pytest.approx(total / count, rel=1e-5)  # float32
    summed = jax.tree.map(lambda *several: sum(several) / count, *gradients)
    for (path, actual), (_, expected) in zip(
        nnx.to_flat_state(gradient), nnx.to_flat_state(summed), strict=True
    ):
        atol = 2e-5 * np.abs(expected[...]).max() + 1e-8  # as of documents (tests/model)
        np.testing.assert_allclose(actual[...], expected[...], rtol=0, atol=atol, err_msg=str(path))
