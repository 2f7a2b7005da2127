"""RMSNorm and the mean of two, in each implementation, against numpy in float64."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from interpreter import interpret_kernels

from hymba_jax.config.parallel import ParallelConfig
from hymba_jax.model.layers import RMSNorm
from hymba_jax.ops.rms_norm import api
from hymba_jax.ops.rms_norm.pallas_gpu import (
    mean_of_norms_pallas_gpu,
    norm_rows,
    rms_norm_of_residual_pallas_gpu,
)
from hymba_jax.parallel.mesh import make_mesh
from hymba_jax.parallel.shard_map import shard_elements

EPS = 0.1  # which the tests can see
TOLERANCE = {"float32": 2e-6, "bfloat16": 2e-2}
ON_CPU = {
    "one": lambda x, scale: api.rms_norm(x, scale, eps=EPS),
    "residual": lambda x, scale: api.rms_norm_of_residual(x, scale, eps=EPS),
    "two": lambda x, scale, other, other_scale: api.mean_of_norms(
        x, other, scale, other_scale, eps=EPS
    ),
}
ON_GPU = {
    "one": partial(mean_of_norms_pallas_gpu, eps=EPS),
    "residual": partial(rms_norm_of_residual_pallas_gpu, eps=EPS),
    "two": partial(mean_of_norms_pallas_gpu, eps=EPS),
}


def expected(arrays, dy, dresidual):
    """The value and the gradient of each array."""
    terms = list(zip(arrays[::2], arrays[1::2], strict=True))
    value, gradients = 0, []
    for x, scale in terms:
        rms = np.sqrt((x**2).mean(-1, keepdims=True) + EPS)
        value = value + x / rms * scale / len(terms)
        dunit = dy * scale / len(terms)
        dx = dunit / rms - x * (dunit * x).mean(-1, keepdims=True) / rms**3
        gradients += [dx + dresidual, (dy / len(terms) * x / rms).sum((0, 1))]
    return value, gradients


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("length", [3, 150])
@pytest.mark.parametrize("kind", ON_CPU)
@pytest.mark.parametrize("place", ["cpu", "gpu"])
def test_value_and_gradients(place, kind, length, dtype, monkeypatch):
    """Fewer rows than the programs of a gradient, and two rows for each program but the last."""
    called = interpret_kernels(monkeypatch)
    rng = np.random.default_rng(length)
    shapes = [(2, length, 320), (320,)] * (2 if kind == "two" else 1)
    arrays = [jnp.asarray(rng.normal(size=shape) + 1, dtype) for shape in shapes]
    dy, dresidual = (jnp.asarray(rng.normal(size=shapes[0]), dtype) for _ in range(2))
    y, vjp = jax.vjp((ON_GPU if place == "gpu" else ON_CPU)[kind], *arrays)
    gradients = vjp((dresidual, dy) if kind == "residual" else dy)
    if kind == "residual":
        residual, y = y
        np.testing.assert_array_equal(residual, arrays[0])
    added = np.float64(dresidual) if kind == "residual" else 0
    value, wanted = expected([*map(np.float64, arrays)], np.float64(dy), added)
    for actual, exact, of in zip((y, *gradients), (value, *wanted), (dy, *arrays), strict=True):
        assert actual.dtype == of.dtype
        atol = TOLERANCE[dtype] * np.abs(exact).max()
        np.testing.assert_allclose(np.float64(actual), exact, rtol=0, atol=atol)
    assert set(called) == ({"rms_norm_forward", "rms_norm_backward"} if place == "gpu" else set())


def test_rounded_once(monkeypatch):
    """The mean of two norms is what float32 has, rounded."""
    interpret_kernels(monkeypatch)
    rng = np.random.default_rng(0)
    x, other = (jnp.asarray(rng.normal(size=(4, 300)), jnp.bfloat16) for _ in range(2))
    scale, other_scale = (jnp.asarray(rng.normal(size=300), jnp.bfloat16) for _ in range(2))
    actual = norm_rows([(x, scale), (other, other_scale)], EPS)
    in_float32 = [
        (a.astype(jnp.float32), s.astype(jnp.float32))
        for a, s in ((x, scale), (other, other_scale))
    ]
    np.testing.assert_array_equal(actual, norm_rows(in_float32, EPS).astype(jnp.bfloat16))


@pytest.mark.parametrize(
    ("name", "axis"), [("hidden", None), ("channels", "channels"), ("dt_rank", None)]
)
def test_along_which_axis_activations_are_sharded(name, axis):
    assert RMSNorm((4,), (name,), EPS, "float32").axis == axis


def test_sizes_are_those_of_a_shard():
    """Of arrays above 2**31 elements, too."""
    mesh = make_mesh(jax.devices("cpu")[:8], ParallelConfig(data=2, fsdp=2, tensor=2))
    x = jax.ShapeDtypeStruct((8, 2**20, 1024), "bfloat16")
    axes = ("batch", "length", "channels")
    assert shard_elements(x, axes) == x.size
    with jax.set_mesh(mesh):
        assert shard_elements(x, axes) == x.size // 8
        assert shard_elements(x, ("batch", "length", None)) == x.size // 4


class TestWhichImplementation:
    """What `api.py` chooses on a GPU."""

    @pytest.fixture(autouse=True)
    def called(self, monkeypatch):
        monkeypatch.setattr(api, "target_platform", lambda: "gpu")
        return interpret_kernels(monkeypatch)

    @pytest.mark.parametrize(
        ("shape", "scale_shape", "kernels"),
        [
            ((1, 2, 256), (256,), 1),
            ((1, 2, 255), (255,), 0),  # XLA keeps so short a row
            ((1, 1, 8200), (8200,), 0),  # more than the registers of a program
            ((1, 2, 2, 256), (2, 256), 0),  # a norm per head
        ],
    )
    def test_by_shape(self, called, shape, scale_shape, kernels):
        api.rms_norm(jnp.ones(shape), jnp.ones(scale_shape), eps=EPS)
        assert len(called) == kernels

    @pytest.mark.parametrize(("kept", "forward"), [("activation", 1), ("norm", 2)])
    def test_what_is_kept_is_not_computed_again(self, called, kept, forward):
        """`compute.remat` "activations", and "dots"."""
        policy = jax.checkpoint_policies.save_only_these_names(kept)

        def loss(x, scale):
            return jnp.square(api.rms_norm(x, scale, eps=EPS)).sum()

        gradient = jax.grad(jax.checkpoint(loss, policy=policy), argnums=(0, 1))
        jaxpr = str(jax.make_jaxpr(gradient)(jnp.ones((1, 2, 256)), jnp.ones(256)))
        assert jaxpr.count("name=rms_norm_forward") == forward
        assert jaxpr.count("name=rms_norm_backward") == 1

    def test_on_shards(self, called):
        """Of rows, and of channels, which the kernels do not take."""
        mesh = make_mesh(jax.devices("cpu")[:8], ParallelConfig(data=2, fsdp=2, tensor=2))
        rng = np.random.default_rng(0)
        arrays = [rng.normal(size=shape) for shape in ((4, 3, 256), (256,), (4, 3, 256))]
        x, scale, dy = (jnp.asarray(a, jnp.float32) for a in arrays)
        value, (dx, dscale) = expected([*map(np.float64, (x, scale))], np.float64(dy), 0)

        def gradients(x, scale, dy, axis):
            y, vjp = jax.vjp(partial(api.rms_norm, eps=EPS, axis=axis), x, scale)
            return y, *vjp(dy)

        for axis, kernels in ((None, 2), ("channels", 0)):
            called.clear()
            with jax.set_mesh(mesh):
                actual = jax.jit(partial(gradients, axis=axis))(x, scale, dy)
            assert len(set(called)) == kernels
            for a, exact in zip(actual, (value, dx, dscale), strict=True):
                np.testing.assert_allclose(a, exact, rtol=0, atol=1e-5)
