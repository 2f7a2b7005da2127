"""Distillation's loss and gradients against the formula in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from hymba_jax.config.parallel import ParallelConfig
from hymba_jax.ops import chunked_logits
from hymba_jax.ops.chunked_logits import Projection
from hymba_jax.ops.distillation import distillation
from hymba_jax.parallel.mesh import make_mesh, partition

BATCH, LENGTH, HIDDEN, TEACHER_HIDDEN, VOCAB = 8, 6, 16, 24, 32
TIED, UNTIED = ("vocab", "hidden"), ("hidden", "vocab")
T, WEIGHT = 2.5, 0.7


def operands():
    """Of student and teacher; kernels as (hidden, vocab)."""
    rng = np.random.default_rng(0)
    x, teacher_x = (rng.normal(size=(BATCH, LENGTH, size)) for size in (HIDDEN, TEACHER_HIDDEN))
    kernel, teacher_kernel = (rng.normal(size=(size, VOCAB)) for size in (HIDDEN, TEACHER_HIDDEN))
    targets = rng.integers(0, VOCAB, (BATCH, LENGTH)).astype(np.int32)
    valid = rng.random((BATCH, LENGTH)) < 0.7
    targets[~valid] = -100
    return x, kernel, teacher_x, teacher_kernel, targets, valid


def log_softmax(logits):
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def formula(x, kernel, teacher_x, teacher_kernel, targets, valid):
    """Loss, nats, divergence and the gradients of x and kernel."""
    logits, given = x @ kernel, teacher_x @ teacher_kernel
    hard, soft, wanted = log_softmax(logits), log_softmax(logits / T), log_softmax(given / T)
    one_hot = np.eye(VOCAB)[np.where(valid, targets, 0)]
    nats = -(one_hot * hard).sum(-1) * valid
    divergence = (np.exp(wanted) * (wanted - soft)).sum(-1) * valid
    loss = ((1 - WEIGHT) * nats + WEIGHT * T**2 * divergence).sum()
    dlogits = (1 - WEIGHT) * (np.exp(hard) - one_hot) + WEIGHT * T * (np.exp(soft) - np.exp(wanted))
    dlogits *= valid[..., None]
    return loss, nats, divergence, dlogits @ kernel.T, np.einsum("blh,blv->hv", x, dlogits)


def run(x, kernel, teacher_x, teacher_kernel, targets, valid, axes, teacher_axes):
    """The same of the op, of kernels with these axes."""

    def loss(x, kernel, teacher_x, teacher_kernel, targets, valid):
        student, teacher = (
            Projection(x, kernel, axes), Projection(teacher_x, teacher_kernel, teacher_axes)
        )  # fmt: skip
        total = distillation(student, teacher, targets, valid, temperature=T, weight=WEIGHT)
        return 3 * total.loss, total

    run = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
    (_, total), gradients = run(x, kernel, teacher_x, teacher_kernel, targets, valid)
    return *total, *(gradient / 3 for gradient in gradients)


def assert_close(actual, expected):
    """Up to sums in float32, of the largest value of each array."""
    for value, wanted in zip(actual, expected, strict=True):
        np.testing.assert_allclose(value, wanted, rtol=0, atol=2e-6 * np.abs(wanted).max())


def stored(kernel, axes):
    return jnp.float32(kernel if axes == UNTIED else kernel.T)


@pytest.mark.parametrize(
    ("axes", "teacher_axes", "chunk", "parallel"),
    [
        (TIED, UNTIED, 13, None),
        (UNTIED, TIED, 4, ParallelConfig(data=2, fsdp=2, tensor=2)),
        (TIED, TIED, 4, ParallelConfig(fsdp=2, sequence=2, tensor=2)),
    ],
)
def test_values_and_gradients(monkeypatch, axes, teacher_axes, chunk, parallel):
    """In chunks with padding, on one device and on eight."""
    monkeypatch.setattr(chunked_logits, "CHUNK", chunk)
    arrays = operands()
    x, kernel, teacher_x, teacher_kernel, targets, valid = arrays
    given = (
        jnp.float32(x),
        stored(kernel, axes),
        jnp.float32(teacher_x),
        stored(teacher_kernel, teacher_axes),
        targets,
        valid,
    )
    if parallel is None:
        actual = run(*given, axes, teacher_axes)
    else:
        mesh = make_mesh(jax.devices()[:8], parallel)
        sizes = {"batch": BATCH, "length": LENGTH, "hidden": 8, "vocab": VOCAB}
        rows = ("batch", "length")
        specs = ((*rows, None), axes, (*rows, None), teacher_axes, rows, rows)
        given = [
            jax.device_put(array, NamedSharding(mesh, partition(spec, sizes, mesh)))
            for array, spec in zip(given, specs, strict=True)
        ]
        with jax.set_mesh(mesh):
            actual = run(*given, axes, teacher_axes)
        assert actual[4].sharding.is_equivalent_to(given[1].sharding, 2)
    expected = list(formula(*arrays))
    expected[4] = expected[4] if axes == UNTIED else expected[4].T
    assert_close(actual, expected)


def test_a_student_like_its_teacher_has_no_divergence():
    x, kernel, *_, targets, valid = operands()
    same = Projection(jnp.float32(x), jnp.float32(kernel))
    targets, valid = jnp.asarray(targets), jnp.asarray(valid)
    total = distillation(same, same, targets, valid, temperature=T, weight=1.0)
    np.testing.assert_allclose(total.divergence, 0, atol=1e-5)
    np.testing.assert_allclose(total.loss, 0, atol=1e-4)


def test_no_batch_of_logits_exists():
    """Three matmuls of the student and one of the teacher, in each chunk."""
    x, kernel = jnp.ones((16, 2048, 8)), jnp.ones((8, 1024))
    targets, valid = jnp.zeros((16, 2048), jnp.int32), jnp.ones((16, 2048), bool)

    def loss(x, kernel, teacher):
        student, given = Projection(x, kernel), Projection(x, teacher)
        return distillation(student, given, targets, valid, temperature=2.0, weight=0.5).loss

    traced = jax.jit(jax.grad(loss, (0, 1))).trace(x, kernel, 2 * kernel)
    assert str(traced.jaxpr).count("dot_general") == 4
    memory = traced.lower().compile().memory_analysis().temp_size_in_bytes
    assert memory < 4 * targets.size * kernel.shape[1]
