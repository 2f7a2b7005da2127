import jax
import jax.numpy as jnp
import numpy as np

from hymba_jax.data import IGNORED_TARGET
from hymba_jax.training.loss import next_token_loss


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
    loss = next_token_loss(jnp.asarray(logits), jnp.asarray(targets))
    assert int(loss.tokens) == 16
    np.testing.assert_allclose(loss.nats, expected, rtol=1e-6)  # float32 rounding


def test_ignored_targets_leave_no_gradient():
    logits = jnp.ones((1, 3, 5))
    targets = jnp.array([[2, IGNORED_TARGET, 4]])
    grad = jax.grad(lambda logits: next_token_loss(logits, targets).nats)(logits)
    assert not np.any(grad[0, 1])
    assert np.all(np.any(grad[0, ::2], axis=-1))


def test_loss_is_float32_from_bfloat16_logits():
    loss = next_token_loss(jnp.ones((1, 2, 5), jnp.bfloat16), jnp.zeros((1, 2), jnp.int32))
    assert loss.nats.dtype == jnp.float32
    np.testing.assert_allclose(loss.nats, 2 * np.log(5), rtol=1e-6)
