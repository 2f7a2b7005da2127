import jax
import jax.numpy as jnp
import numpy as np

from hymba_jax.data import IGNORED_TARGET
from hymba_jax.training.loss import Average, add_averages, cross_entropy, means


def test_loss_equals_a_float64_log_softmax():
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 5, (3, 7, 11)).astype(np.float32)
    targets = rng.integers(0, 11, (3, 7)).astype(np.int32)
    targets[1, 2:] = IGNORED_TARGET

    exact = logits.astype(np.float64)
    log_probs = exact - np.log(np.exp(exact).sum(-1, keepdims=True))
    expected = -sum(
        log_probs[b, t, targets[b, t]]
        for b in range(3)
        for t in range(7)
        if targets[b, t] != IGNORED_TARGET
    )
    loss = cross_entropy(jnp.asarray(logits), jnp.asarray(targets))
    assert int(loss.weight) == 16
    np.testing.assert_allclose(loss.total, expected, rtol=1e-6)  # float32 rounding


def test_ignored_targets_leave_no_gradient():
    logits = jnp.ones((1, 3, 5))
    targets = jnp.array([[2, IGNORED_TARGET, 4]])
    grad = jax.grad(lambda logits: cross_entropy(logits, targets).total)(logits)
    assert not np.any(grad[0, 1])
    assert np.all(np.any(grad[0, ::2], axis=-1))


def test_loss_is_float32_from_bfloat16_logits():
    loss = cross_entropy(jnp.ones((1, 2, 5), jnp.bfloat16), jnp.zeros((1, 2), jnp.int32))
    assert loss.total.dtype == jnp.float32
    np.testing.assert_allclose(loss.total, 2 * np.log(5), rtol=1e-6)


def test_averages_of_unequal_batches_add_up_to_that_of_all():
    """2 + 4 over three tokens, and 9 over one: 15 / 4; an average over nothing has no mean."""
    batches = [
        {"loss": Average(jnp.float32(6), jnp.int32(3)), "none": Average(jnp.float32(0), 0)},
        {"loss": Average(jnp.float32(9), jnp.int32(1)), "new": Average(jnp.float32(1), 2)},
    ]
    assert means(add_averages(batches)) == {"loss": 3.75, "new": 0.5}
