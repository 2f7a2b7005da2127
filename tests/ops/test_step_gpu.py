"""The kernels of decoding for GPUs, in Pallas's interpreter, against numpy in float64."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from interpreter import interpret_kernels
from test_causal_conv import dsilu, silu

from hymba_jax.ops.attention import attention_step, step_gpu
from hymba_jax.ops.causal_conv import causal_conv
from hymba_jax.ops.int8_rows import Int8Rows
from hymba_jax.ops.selective_scan import selective_scan_step

KV_HEADS, HEADS, HEAD_DIM, VALUE_DIM = 2, 5, 16, 32
ROUNDING = 2**-8  # of weights, and of the result, to bfloat16


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    """What GPUs run; the names of those that were called."""
    called = interpret_kernels(monkeypatch)
    for op in ("attention", "selective_scan"):
        monkeypatch.setattr(f"hymba_jax.ops.{op}.step.target_platform", lambda: "gpu")
    monkeypatch.setattr("hymba_jax.ops.causal_conv.api.target_platform", lambda: "gpu")
    return called


def random(rng, *shape):
    return jnp.asarray(rng.normal(size=shape), jnp.bfloat16)


def softmax_of(query, key, value):
    """Each query head over the keys of its key/value head, (heads, dim)."""
    scores = np.einsum("hgd,hsd->hgs", query, key) / np.sqrt(query.shape[-1])
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("hgs,hsv->hgv", weights / weights.sum(-1, keepdims=True), value)


@pytest.mark.parametrize(
    ("batch", "slots", "meta", "int8"),
    [(3, 70, 130, False), (3, 70, 3, True), (1, 1100, 0, False), (1, 600, 64, True)],
)
def test_attention(kernels, batch, slots, meta, int8):
    """Several blocks, a part of one, and none; slots split among programs where rows are few."""
    rng = np.random.default_rng(slots + meta)
    tokens = [slots + 30, 0, slots // 2 + 1][:batch]
    filled = np.minimum(tokens, slots)
    query = random(rng, batch, KV_HEADS, HEADS, HEAD_DIM)
    key, value = (random(rng, batch, KV_HEADS, dim) for dim in (HEAD_DIM, VALUE_DIM))
    meta_key, meta_value = (random(rng, KV_HEADS, meta, dim) for dim in (HEAD_DIM, VALUE_DIM))
    past = [random(rng, batch, KV_HEADS, slots, dim) for dim in (HEAD_DIM, VALUE_DIM)]
    if int8:
        sizes = jnp.asarray(np.geomspace(1, 30, slots)[None, None, :, None], jnp.bfloat16)
        past = [Int8Rows.of(a * sizes) for a in past]
    else:  # what unfilled slots hold has no effect
        is_empty = np.arange(slots) >= np.asarray(filled)[:, None]
        past = [jnp.where(is_empty[:, None, :, None], jnp.nan, a) for a in past]
    actual = jax.jit(attention_step)(
        query.reshape(batch, KV_HEADS * HEADS, HEAD_DIM),
        key,
        value,
        past_key=past[0],
        past_value=past[1],
        past_length=jnp.asarray(tokens),
        meta_key=meta_key,
        meta_value=meta_value,
    )
    assert kernels == ["attention_step"]
    assert actual.dtype == jnp.bfloat16
    kv = zip(past, (key, value), (meta_key, meta_value), strict=True)
    kv = [tuple(np.float64(a.astype(jnp.float32)) for a in arrays) for arrays in kv]
    for row, count in enumerate(filled):
        keys, values = (
            np.concatenate([old[row, :, :count], new[row, :, None], of_meta], axis=1)
            for old, new, of_meta in kv
        )
        expected = softmax_of(np.float64(query)[row], keys, values)
        result = np.float64(actual)[row].reshape(expected.shape)
        atol = 2 * ROUNDING * np.abs(values).max()
        np.testing.assert_allclose(result, expected, rtol=0, atol=atol)


@pytest.mark.parametrize(
    ("dtype", "heads", "head_dim", "value_dim"),
    [("float32", 5, 16, 32), ("bfloat16", 17, 16, 32), ("bfloat16", 5, 24, 48)],
)
def test_what_triton_lacks_is_in_xla(kernels, dtype, heads, head_dim, value_dim):
    arrays = {
        "query": (1, heads, head_dim),
        "key": (1, 1, head_dim),
        "value": (1, 1, value_dim),
        "past_key": (1, 1, 4, head_dim),
        "past_value": (1, 1, 4, value_dim),
        "meta_key": (1, 2, head_dim),
        "meta_value": (1, 2, value_dim),
    }
    arrays = {name: jnp.zeros(shape, dtype) for name, shape in arrays.items()}
    jax.eval_shape(attention_step, **arrays, past_length=jnp.asarray([3]))
    assert not kernels


def recurrence(x, dt, A, B, C, state, D=0.0, z=None, dt_bias=0.0):
    delta = np.log1p(np.exp(dt + dt_bias))
    state = np.exp(delta[:, None] * A) * state + (delta * x)[:, None] * B[:, :, None]
    y = (state * C[:, :, None]).sum(1) + D * x
    return y if z is None else y * z / (1 + np.exp(-z)), state


@pytest.mark.parametrize("optional", [(), ("D", "z", "dt_bias")])
@pytest.mark.parametrize("channels", [48, 256])
def test_selective_scan(kernels, channels, optional):
    """Values and gradients; a time step of softplus(-inf) = 0 leaves the state as it is, and so
    does padding, whatever it holds."""
    rng = np.random.default_rng(channels)
    shapes = {
        **dict.fromkeys(("x", "dt", "z"), (3, channels)),
        **dict.fromkeys(("B", "C"), (3, 4)),
        **dict.fromkeys(("D", "dt_bias"), (channels,)),
        "A": (4, channels),
        "state": (3, 4, channels),
    }
    needed = shapes.keys() - {"D", "z", "dt_bias"} | set(optional)
    inputs = {name: np.float32(rng.normal(size=shapes[name])) for name in sorted(needed)}
    inputs["A"] = -np.exp(inputs["A"])
    expected = recurrence(**{name: np.float64(a) for name, a in inputs.items()})
    step = jax.jit(selective_scan_step)
    for actual, exact in zip(step(**inputs), expected, strict=True):
        np.testing.assert_allclose(actual, exact, rtol=0, atol=1e-5 * np.abs(exact).max())
    stopped = inputs | {"dt": np.full_like(inputs["dt"], -np.inf)}
    np.testing.assert_array_equal(step(**stopped)[1], inputs["state"])
    x = inputs["x"].copy()
    x[1] = np.nan
    valid = np.array([True, False, True])
    moved = inputs | {"x": x}
    padded = step(**moved, valid=valid)

    def total(A, moved, valid):
        return selective_scan_step(**moved | {"A": A}, valid=valid)[0].sum()

    assert np.isfinite(jax.jit(jax.grad(total))(inputs["A"], moved, valid)).all()
    for actual, full, padding in zip(padded, step(**inputs), (0, inputs["state"][1]), strict=True):
        np.testing.assert_array_equal(actual[::2], full[::2])
        np.testing.assert_array_equal(actual[1], np.broadcast_to(padding, actual[1].shape))
    assert kernels
    assert set(kernels) == {"selective_scan_step"}

    def loss(inputs):
        y, state = selective_scan_step(**inputs)
        return (y**2).sum() + (state**2).sum()

    def exact_loss(name, moved):
        arrays = {other: np.float64(a) for other, a in inputs.items()} | {name: moved}
        y, state = recurrence(**arrays)
        return (y**2).sum() + (state**2).sum()

    for name, gradient in jax.jit(jax.grad(loss))(inputs).items():
        direction = rng.normal(size=inputs[name].shape)
        above, below = (
            exact_loss(name, np.float64(inputs[name]) + sign * 1e-5 * direction) for sign in (1, -1)
        )
        slope = (above - below) / 2e-5
        along = (np.float64(gradient) * direction).sum()
        assert abs(along - slope) <= 1e-4 * np.abs(np.float64(gradient) * direction).sum()


def test_states_of_16_bits_are_in_xla(kernels):
    given = {"x": (1, 16), "dt": (1, 16), "A": (2, 16), "B": (1, 2), "C": (1, 2)}
    arrays = {name: jnp.ones(shape) for name, shape in given.items()}
    arrays["state"] = jnp.zeros((1, 2, 16), jnp.bfloat16)
    jax.eval_shape(selective_scan_step, **arrays)
    assert not kernels


@pytest.mark.parametrize(("channels", "kernel"), [(48, 4), (1024, 3)])
def test_causal_conv(kernels, channels, kernel):
    """Values and gradients, and a row of padding, whatever it holds."""
    rng = np.random.default_rng(kernel)
    shapes = ((3, 1, channels), (kernel, channels), (channels,), (3, kernel - 1, channels))
    x, weight, bias, inputs = (np.float32(rng.normal(size=shape)) for shape in shapes)
    window = np.concatenate([inputs, x], axis=1)
    total = bias + (weight * window).sum(1, keepdims=True)
    y, dtotal = silu(total), dsilu(total)
    x[1], y[1], dtotal[1], window[1, 1:] = np.nan, 0, 0, inputs[1]
    lengths = jnp.asarray([1, 0, 1])

    def conv(weight, bias, inputs):
        return causal_conv(jnp.asarray(x), weight, bias, initial_inputs=inputs, lengths=lengths)

    actual, last = jax.jit(conv)(weight, bias, inputs)
    np.testing.assert_allclose(actual, y, rtol=0, atol=1e-5 * np.abs(y).max())
    np.testing.assert_array_equal(last, window[:, 1:])
    assert kernels == ["causal_conv_step"]

    def loss(*arrays):
        y, last = conv(*arrays)
        return y.sum() + 2 * last.sum()

    gradients = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(weight, bias, inputs)
    stays = np.concatenate([np.zeros((3, 1, channels)), 2 + np.zeros((3, kernel - 2, channels))], 1)
    stays[1] = 2
    wanted = (dtotal * window).sum(0), dtotal.sum((0, 1)), stays + dtotal * weight[:-1]
    for gradient, expected in zip(gradients, wanted, strict=True):
        np.testing.assert_allclose(gradient, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("channels", "taps", "documents"),
    [(32, 4, True), (24, 4, False), (32, 1, False), (32, 99, False)],
)
def test_a_convolution_that_is_in_xla(kernels, channels, taps, documents):
    """Of rows with several documents, or of numbers of channels and taps that are not for it."""
    shapes = (2, 1, channels), (taps, channels), (channels,)
    conv = partial(causal_conv, segment_ids=jnp.zeros((2, 1), jnp.int32) if documents else None)
    y, inputs = jax.eval_shape(conv, *(jnp.zeros(shape) for shape in shapes))
    assert (y.shape, inputs.shape) == (shapes[0], (2, taps - 1, channels))
    assert not kernels


def test_every_slot_has_a_program():
    """Whatever rows and slots are; an H100 is busy with a single sequence of 8192."""
    split = partial(step_gpu.splits_of, kv_heads=5)
    for batch, slots in [(1, 1), (1, 8192), (128, 8192), (3, 1000)]:
        splits, blocks = split(batch, slots=slots)
        assert splits * blocks * step_gpu.BLOCK >= slots > (splits - 1) * blocks * step_gpu.BLOCK
    assert split(128, slots=8192)[0] == 1
    assert split(1, slots=8192)[0] * 5 >= 132
