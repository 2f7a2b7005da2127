"""Loss and gradients against the formula in float64, whatever the chunks and the mesh."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from hymba_jax.config.parallel import ParallelConfig
from hymba_jax.ops import chunked_logits as op
from hymba_jax.ops.cross_entropy import cross_entropy, token_nats
from hymba_jax.parallel.mesh import make_mesh, partition

BATCH, LENGTH, HIDDEN, VOCAB = 8, 6, 16, 24
TOKENS = 20  # the rest of the vocabulary is padding
AXES = {"untied": ("hidden", "vocab"), "tied": ("vocab", "hidden")}


def operands(axes, vocab=VOCAB):
    """Logits of a size up to 20, some of them of positions that are not valid."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(BATCH, LENGTH, HIDDEN))
    kernel = rng.normal(0, 1.5, (HIDDEN, vocab))
    targets = rng.integers(0, TOKENS, (BATCH, LENGTH)).astype(np.int32)
    valid = rng.random((BATCH, LENGTH)) < 0.7
    targets[~valid] = -100
    return x, kernel if axes[0] == "hidden" else kernel.T, targets, valid


def formula(x, kernel, targets, valid, axes, z_loss, weights=None):
    """Loss, nats, and the gradients of x and kernel, in float64.

    With weights the gradients are those of the weighted sum of the nats.
    """
    kernel = kernel if axes[0] == "hidden" else kernel.T
    logits = x @ kernel
    log_z = np.log(np.exp(logits).sum(-1))
    nats, dlogits = np.zeros(valid.shape), np.zeros(logits.shape)
    for place in np.argwhere(valid):
        at, target = tuple(place), targets[tuple(place)]
        nats[at] = log_z[at] - logits[at][target]
        probabilities = np.exp(logits[at] - log_z[at])
        dlogits[at] = (1 + 2 * z_loss * log_z[at]) * probabilities
        dlogits[at][target] -= 1
        dlogits[at] *= 1 if weights is None else weights[at]
    loss = nats.sum() + z_loss * (log_z[valid] ** 2).sum()
    dkernel = np.einsum("blh,blv->hv", x, dlogits)
    return loss, nats, dlogits @ kernel.T, dkernel if axes[0] == "hidden" else dkernel.T


def run(x, kernel, targets, valid, axes, z_loss):
    """Loss, nats, and gradients, which have to be scaled by that of the sum."""

    def loss(x, kernel, targets, valid):
        total = cross_entropy(x, kernel, targets, valid, axes=axes, z_loss=z_loss)
        return 3 * total.loss, total

    run = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
    (_, total), gradients = run(x, kernel, targets, valid)
    return *total, *(gradient.astype(jnp.float32) / 3 for gradient in gradients)


def run_nats(x, kernel, targets, valid, axes, weights):
    """Nats, and the gradients of their weighted sum."""

    def loss(x, kernel, targets, valid, weights):
        nats = token_nats(x, kernel, targets, valid, axes=axes)
        return (weights * nats).sum(), nats

    run = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
    (_, nats), gradients = run(x, kernel, targets, valid, weights)
    return nats, *gradients


def make_weights():
    """Of both signs, and some 0."""
    rng = np.random.default_rng(1)
    return rng.normal(size=(BATCH, LENGTH)) * (rng.random((BATCH, LENGTH)) < 0.8)


def assert_close(actual, expected):
    """Up to sums in float32, of the largest value of each array."""
    for value, wanted in zip(actual, expected, strict=True):
        np.testing.assert_allclose(value, wanted, rtol=0, atol=1e-6 * np.abs(wanted).max())


@pytest.mark.parametrize(("axes", "chunk", "z_loss"), [("tied", 13, 0.0), ("untied", 2048, 0.1)])
def test_values_and_gradients(monkeypatch, axes, chunk, z_loss):
    """In four chunks with padding, and in one."""
    monkeypatch.setattr(op, "CHUNK", chunk)
    arrays = operands(AXES[axes])
    expected = formula(*arrays, AXES[axes], z_loss)
    x, kernel, targets, valid = arrays
    given = jnp.float32(x), jnp.float32(kernel), targets, valid
    assert_close(run(*given, AXES[axes], z_loss), expected)
    without_gradient = jax.jit(partial(cross_entropy, axes=AXES[axes], z_loss=z_loss))
    assert_close(without_gradient(*given), expected[:2])


@pytest.mark.parametrize(("axes", "chunk"), [("tied", 13), ("untied", 2048)])
def test_nats_of_each_position(monkeypatch, axes, chunk):
    monkeypatch.setattr(op, "CHUNK", chunk)
    x, kernel, targets, valid = operands(AXES[axes])
    weights = make_weights()
    expected = formula(x, kernel, targets, valid, AXES[axes], 0.0, weights)
    given = jnp.float32(x), jnp.float32(kernel), targets, valid
    assert_close(run_nats(*given, AXES[axes], jnp.float32(weights)), expected[1:])


def test_bfloat16_operands_and_float32_sums():
    """The kernel is rounded as it is read, and so is the gradient of the logits, to 8 bits."""
    x, kernel, targets, valid = operands(AXES["tied"])
    x, kernel = jnp.bfloat16(x), jnp.float32(kernel)
    exact = [np.asarray(a, np.float64) for a in (x, kernel.astype(jnp.bfloat16))]
    expected = formula(*exact, targets, valid, AXES["tied"], 0.0)
    actual = run(x, kernel, targets, valid, AXES["tied"], 0.0)
    assert_close(actual[:2], expected[:2])
    for value, wanted in zip(actual[2:], expected[2:], strict=True):
        np.testing.assert_allclose(value, wanted, rtol=0, atol=2**-8 * np.abs(wanted).max())


MESHES = {
    "fsdp-8": ParallelConfig(fsdp=8),
    "2x2x2": ParallelConfig(data=2, fsdp=2, tensor=2),
    "2x2x2-sequence": ParallelConfig(fsdp=2, sequence=2, tensor=2),
}


@pytest.mark.parametrize(
    ("name", "axes", "vocab"),
    [
        ("fsdp-8", "tied", VOCAB),
        ("2x2x2", "untied", VOCAB + 1),  # which tensor 2 cannot shard
        ("2x2x2-sequence", "tied", VOCAB),
    ],
)
def test_sharded(monkeypatch, name, axes, vocab):
    """Devices have 6 or 12 positions; kernels of their rows, and gradients too, are sharded."""
    monkeypatch.setattr(op, "CHUNK", 4)
    arrays, mesh = operands(AXES[axes], vocab), make_mesh(jax.devices()[:8], MESHES[name])
    expected = formula(*arrays, AXES[axes], 0.1)
    sizes = {"batch": BATCH, "length": LENGTH, "hidden": HIDDEN, "vocab": vocab}
    rows = ("batch", "length")
    x, kernel, targets, valid = (
        jax.device_put(array, NamedSharding(mesh, partition(spec, sizes, mesh)))
        for array, spec in zip(arrays, ((*rows, None), AXES[axes], rows, rows), strict=True)
    )
    with jax.set_mesh(mesh):
        actual = run(jnp.float32(x), jnp.float32(kernel), targets, valid, AXES[axes], 0.1)
        if axes == "untied":
            weights = make_weights()
            given = jnp.float32(x), jnp.float32(kernel), targets, valid
            nats = run_nats(*given, AXES[axes], jnp.float32(weights))
            assert_close(nats, formula(*arrays, AXES[axes], 0.0, weights)[1:])
    assert_close(actual, expected)
    assert actual[3].sharding.is_equivalent_to(kernel.sharding, 2)


def test_rows_that_devices_share():
    """One sequence on 8 devices, which hold the kernel in shards: no gradient counts twice."""
    x, kernel, targets, valid = operands(AXES["untied"])
    arrays = x[:1], kernel, targets[:1], valid[:1]
    with jax.set_mesh(make_mesh(jax.devices()[:8])):
        given = jnp.float32(arrays[0]), jnp.float32(kernel), *arrays[2:]
        assert_close(run(*given, AXES["untied"], 0.0), formula(*arrays, AXES["untied"], 0.0))


def test_no_matmul_is_done_twice_and_no_batch_of_logits_exists():
    """Three matmuls a chunk; what a step needs grows with the hidden states, not the logits."""
    x, kernel = jnp.ones((4, 2048, 8)), jnp.ones((8, 1024))
    targets, valid = jnp.zeros((4, 2048), jnp.int32), jnp.ones((4, 2048), bool)

    def loss(x, kernel):
        return cross_entropy(x, kernel, targets, valid).loss

    for function, matmuls in ((loss, 1), (jax.grad(loss, (0, 1)), 3)):
        traced = jax.jit(function).trace(x, kernel)
        assert str(traced.jaxpr).count("dot_general") == matmuls
        memory = traced.lower().compile().memory_analysis().temp_size_in_bytes
        assert memory < 4 * targets.size * kernel.shape[1]
