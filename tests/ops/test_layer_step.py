"""The kernels of a layer's position, in Pallas's interpreter, against numpy in float64."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from interpreter import interpret_kernels
from slow import slow_but

from hymba_jax.ops.attention.step_gpu import AttentionParts
from hymba_jax.ops.int8_matmul import quantize
from hymba_jax.ops.layer_step import (
    Int8Kernel,
    LayerSizes,
    NormedRows,
    ScanParams,
    convolve_and_project,
    finish_heads,
    project_gated,
    project_heads,
    project_residual,
    takes_layer_step,
)

EPS = 0.1  # which the tests can see
ROUNDING = 2**-8  # to bfloat16
ROWS = slow_but([1, 3, 16, 39], 1, 39)


@pytest.fixture(autouse=True)
def interpreter(monkeypatch):
    interpret_kernels(monkeypatch)


def random(rng, *shape, dtype=jnp.bfloat16):
    return jnp.asarray(rng.normal(size=shape), dtype)


def float64(array):
    return np.float64(array.astype(jnp.float32))


def kernel_of(rng, features, outputs, *, int8):
    """A kernel in bfloat16 or in 8 bits, and what it holds."""
    kernel = random(rng, features, outputs) / features**0.5
    if not int8:
        return kernel, float64(kernel)
    kernel = Int8Kernel(*quantize(kernel))
    return kernel, float64(kernel.integers) * float64(kernel.scale)


def normed(x, scale):
    x = float64(x)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + EPS) * float64(scale)


def assert_rounded(actual, expected, times=4):
    """Equal but for a few roundings of numbers of that size."""
    atol = times * ROUNDING * np.abs(expected).max()
    np.testing.assert_allclose(float64(actual), expected, rtol=0, atol=atol)


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("hidden", [96, 256])
def test_project_heads(hidden, rows, int8):
    """Features in several tiles and in one; heads that are rotated, and others."""
    rng = np.random.default_rng(rows)
    half, outputs = 16, [96, 32, 64, 128]
    x, scale = random(rng, rows, hidden), random(rng, hidden)
    kernel, values = kernel_of(rng, hidden, sum(outputs), int8=int8)
    angles = rng.uniform(0, 6, (rows, half))
    cos, sin = (jnp.asarray(a, jnp.float32) for a in (np.cos(angles), np.sin(angles)))
    actual = project_heads(
        NormedRows(x, scale), kernel, cos, sin, outputs=outputs, rotated=2, eps=EPS
    )
    expected = np.split(normed(x, scale) @ values, np.cumsum(outputs)[:-1], axis=1)
    for i in range(2):
        first, second = np.moveaxis(expected[i].reshape(rows, -1, 2, half), 2, 0)
        cosine, sine = np.cos(angles)[:, None], np.sin(angles)[:, None]
        turned = first * cosine - second * sine, second * cosine + first * sine
        expected[i] = np.stack(turned, 2).reshape(rows, -1)
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == jnp.bfloat16
        assert_rounded(a, b)


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("rows", ROWS)
def test_project_gated(rows, int8):
    rng = np.random.default_rng(rows)
    x, scale = random(rng, rows, 64), random(rng, 64)
    kernel, values = kernel_of(rng, 64, 2 * 96, int8=int8)
    gate, up = np.split(normed(x, scale) @ values, 2, axis=1)
    actual = project_gated(NormedRows(x, scale), kernel, eps=EPS)
    assert_rounded(actual, gate / (1 + np.exp(-gate)) * up)


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("normed_terms", [0, 2])
def test_project_residual(normed_terms, rows, int8):
    """One term as it is, and the mean of two that are normalised."""
    rng = np.random.default_rng(rows)
    residual = random(rng, rows, 64)
    kernel, values = kernel_of(rng, 160, 64, int8=int8)
    xs = [random(rng, rows, 160) * 10.0**i for i in range(max(normed_terms, 1))]
    scales = [random(rng, 160) for _ in range(normed_terms)]
    terms = [NormedRows(x, scales[i] if scales else None) for i, x in enumerate(xs)]
    actual = project_residual(terms, kernel, residual, eps=EPS)
    mean = np.mean([normed(x, scale) if scale is not None else float64(x) for x, scale in terms], 0)
    assert_rounded(actual, float64(residual) + mean @ values)


@pytest.mark.parametrize("programs", [1, 3])
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("rows", ROWS)
def test_heads(rows, int8, programs):
    """Convolution, selection, recurrence, and the attention's parts; the second row is padding."""
    rng = np.random.default_rng(rows)
    channels, state, rank, taps, heads, value_dim = 192, 16, 5, 4, 6, 32
    x, z, last = (random(rng, rows, *shape) for shape in ((channels,), (channels,), (3, channels)))
    weight, bias = random(rng, taps, channels), random(rng, channels)
    lengths = jnp.ones(rows, jnp.int32).at[1:2].set(0)
    x_proj, selection = kernel_of(rng, channels, rank + 2 * state, int8=int8)
    norms = [random(rng, width) for width in (rank, state, state)]
    dt_proj = random(rng, rank, channels)
    floats = partial(random, rng, dtype=jnp.float32)
    dt_bias, A_log, D = floats(channels), floats(state, channels), floats(channels)
    before = floats(rows, state, channels)

    u, inputs, sums = convolve_and_project(x, weight, bias, last, lengths, x_proj, state)
    window = np.concatenate([float64(last), float64(x)[:, None]], 1)
    valid = float64(lengths)[:, None]
    convolved = (window * float64(weight)).sum(1) + float64(bias)
    expected_u = convolved / (1 + np.exp(-convolved)) * valid
    assert_rounded(u, expected_u)
    kept = np.where(valid[:, :, None] > 0, window[:, 1:], window[:, :-1])
    np.testing.assert_array_equal(float64(inputs), kept)

    parts = AttentionParts(floats(rows, 2, programs, heads // 2, value_dim))
    attended = float64(parts.sums)[:, :, 0]
    if programs > 1:
        totals = jnp.exp(floats(*parts.sums.shape[:-1]))
        parts = AttentionParts(parts.sums, totals, 30 * floats(*totals.shape))
        factors = np.exp(float64(parts.largest) - float64(parts.largest).max(2, keepdims=True))
        attended = (float64(parts.sums) * factors[..., None]).sum(2)
        attended = attended / (float64(totals) * factors).sum(2)[..., None]
    params = ScanParams(x_proj.scale if int8 else None, *norms, dt_proj, dt_bias, A_log, D)
    attention, y, after = finish_heads(parts, u, z, sums, params, before, lengths, eps=EPS)
    assert_rounded(attention, attended.reshape(rows, channels))

    u = float64(u)
    dt, B, C = np.split(u @ selection, (rank, rank + state), axis=1)
    dt, B, C = (normed(jnp.asarray(a), norm) for a, norm in zip((dt, B, C), norms, strict=True))
    delta = np.logaddexp(0, dt @ float64(dt_proj) + float64(dt_bias))
    decay = np.exp(-delta[:, None] * np.exp(float64(A_log)))
    expected = decay * float64(before) + (delta * u)[:, None] * B[:, :, None]
    gate = float64(z) / (1 + np.exp(-float64(z)))
    expected_y = ((expected * C[:, :, None]).sum(1) + float64(D) * u) * gate
    assert_rounded(y, expected_y * valid, times=8)
    expected = np.where(valid[:, None] > 0, expected, float64(before))
    assert_rounded(after, expected, times=8)
    if rows > 1:
        np.testing.assert_array_equal(after[1], before[1])


SIZES = LayerSizes(
    rows=8,
    dtypes=("bfloat16", "bfloat16"),
    state_dtype="float32",
    hidden=192,
    channels=384,
    inner=512,
    heads_of_kv=3,
    head_dim=64,
    value_dim=128,
    cache_elements=2**20,
    projections=(192, 64, 128, 384, 384),
    dt_rank=12,
    state=16,
    taps=4,
)


@pytest.mark.parametrize(
    ("size", "taken", "refused"),
    [
        ("rows", 128, 129),
        ("dtypes", ("float16", "float16"), ("float32", "float32")),
        ("dtypes", ("bfloat16", "bfloat16"), ("bfloat16", "float32")),
        ("state_dtype", "float32", "bfloat16"),
        ("hidden", 96, 80),
        ("channels", 416, 400),
        ("inner", 0, 1000),
        ("heads_of_kv", 16, 17),
        ("head_dim", 32, 16),
        ("value_dim", 32, 48),
        ("cache_elements", 2**31 - 1, 2**31),
        ("projections", (192, 64), (192, 96)),
        ("dt_rank", 256, 257),
        ("state", 256, 512),
        ("state", 16, 8),
        ("state", 32, 24),
        ("taps", 16, 17),
        ("taps", 2, 1),
    ],
)
def test_which_layers_are_taken(monkeypatch, size, taken, refused):
    monkeypatch.setattr("hymba_jax.ops.layer_step.sizes.target_platform", lambda: "gpu")
    assert takes_layer_step(SIZES._replace(**{size: taken}))
    assert not takes_layer_step(SIZES._replace(**{size: refused}))


def test_only_layers_on_one_gpu_are_taken(monkeypatch):
    assert not takes_layer_step(SIZES)  # on a CPU
    monkeypatch.setattr("hymba_jax.ops.layer_step.sizes.target_platform", lambda: "older gpu")
    for devices in (1, 2):
        with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((devices,), ("fsdp",))):
            assert takes_layer_step(SIZES) == (devices == 1)
