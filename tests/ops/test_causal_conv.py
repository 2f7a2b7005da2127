"""The causal convolution against its formula in numpy, float64."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hymba_jax.ops.causal_conv import causal_conv

# Float32 rounds at 6e-8; sums of at most some hundred terms, relative to the largest entry.
FLOAT32 = 1e-5


def make_inputs(length, kernel, batch=2, channels=5):
    rng = np.random.default_rng(length)
    return {
        "x": rng.normal(size=(batch, length, channels)).astype(np.float32),
        "weight": rng.normal(size=(kernel, channels)).astype(np.float32),
        "bias": rng.normal(size=channels).astype(np.float32),
        "initial_inputs": rng.normal(size=(batch, kernel - 1, channels)).astype(np.float32),
    }


def make_marks(batch, length):
    """Rows from empty to full, of documents of three positions or so, past their ends too. Ids only
    differ from the one before."""
    starts = np.random.default_rng(2).random((batch, length)) < 0.3
    lengths = np.arange(batch) * length // (batch - 1)
    return {"segment_ids": starts.cumsum(1) % 2, "lengths": lengths}


def oracle(**inputs):
    total, final_inputs = sums(**inputs)
    return silu(total), final_inputs


def silu(v):
    return v / (1 + np.exp(-v))


def dsilu(v):
    sigmoid = 1 / (1 + np.exp(-v))
    return sigmoid * (1 + v * (1 - sigmoid))


def sums(x, weight, bias, initial_inputs, segment_ids=None, lengths=None):
    """What silu is applied to, one row and position after another in float64, with a window of the
    inputs before it."""
    y = np.zeros(x.shape)
    final_inputs = []
    for row, before in enumerate(initial_inputs.astype(np.float64)):
        window = before
        for t in range(x.shape[1] if lengths is None else lengths[row]):
            if segment_ids is not None and t and segment_ids[row, t] != segment_ids[row, t - 1]:
                window = before
            window = np.concatenate([window, x[row, t][None]])
            y[row, t] = (weight * window).sum(0) + bias
            window = window[1:]
        final_inputs.append(window)
    return y, np.stack(final_inputs)


def device(inputs):
    return {k: jnp.asarray(v) for k, v in inputs.items()}


# One program for each combination of shapes.
conv = jax.jit(causal_conv)


@jax.jit
def gradients_of(inputs, marks, weights):
    return jax.grad(loss_of(partial(causal_conv, **marks), weights))(inputs)


def loss_of(conv, weights):
    """A scalar that gives y and the final inputs different cotangents everywhere."""

    def loss(inputs):
        return sum((w * out).sum() for w, out in zip(weights, conv(**inputs), strict=True))

    return loss


def make_weights(inputs):
    rng = np.random.default_rng(1)
    shapes = inputs["x"].shape, inputs["initial_inputs"].shape
    return [rng.normal(size=s).astype(np.float32) for s in shapes]


def assert_close(actual, expected, relative=0.0):
    atol = FLOAT32 * np.abs(expected).max()
    np.testing.assert_allclose(np.asarray(actual, np.float64), expected, rtol=relative, atol=atol)


MARKED = [(), ("segment_ids",), ("lengths",), ("segment_ids", "lengths")]
KERNELS, LENGTHS = (1, 2, 4), (1, 2, 3, 4, 11)


# Every kernel with every length and with all marks; the longest have all combinations.
@pytest.mark.parametrize(
    ("kernel", "length", "marked"),
    [
        *((kernel, length, MARKED[-1]) for kernel in KERNELS for length in LENGTHS),
        *((KERNELS[-1], LENGTHS[-1], marked) for marked in MARKED[:-1]),
    ],
)
def test_forward(kernel, length, marked):
    inputs, marks = make_inputs(length, kernel, batch=6), make_marks(6, length)
    inputs |= {name: marks[name] for name in marked}
    y, final_inputs = conv(**device(inputs))
    expected_y, expected_inputs = oracle(**inputs)
    assert_close(y, expected_y)
    np.testing.assert_array_equal(final_inputs, expected_inputs)


@pytest.mark.parametrize("marked", [False, True])
def test_zeros_left_of_the_start(marked):
    inputs, marks = make_inputs(6, 4), make_marks(2, 6) if marked else {}
    zeros = np.zeros_like(inputs.pop("initial_inputs"))
    y, final_inputs = conv(**device(inputs | marks))
    expected_y, expected_inputs = oracle(**inputs, **marks, initial_inputs=zeros)
    assert_close(y, expected_y)
    np.testing.assert_array_equal(final_inputs, expected_inputs)


@pytest.mark.parametrize("cut", [1, 2, 7])
def test_two_calls_equal_one(cut):
    inputs = device(make_inputs(11, 4))
    x = inputs.pop("x")
    y, final_inputs = conv(x, **inputs)
    y1, between = conv(x[:, :cut], **inputs)
    inputs["initial_inputs"] = between
    y2, last = conv(x[:, cut:], **inputs)
    np.testing.assert_array_equal(np.concatenate([y1, y2], axis=1), y)
    np.testing.assert_array_equal(last, final_inputs)


def test_single_positions_equal_one_call():
    inputs = make_inputs(7, 4)
    expected_y, expected_inputs = oracle(**inputs)
    x, weight, bias, before = device(inputs).values()
    for t in range(7):
        y, before = conv(x[:, t : t + 1], weight, bias, initial_inputs=before)
        assert_close(y[:, 0], expected_y[:, t])
    np.testing.assert_array_equal(before, expected_inputs)


@pytest.mark.parametrize("marked", [False, True])
def test_gradients(marked):
    """The sums are linear in each input apart: a difference of any step is the derivative."""
    inputs = make_inputs(6, 4, batch=4)
    marks, weights = make_marks(4, 6) if marked else {}, make_weights(inputs)
    through_silu = weights[0] * dsilu(sums(**inputs, **marks)[0]), weights[1]
    loss = loss_of(partial(sums, **marks), through_silu)
    for name, gradient in gradients_of(device(inputs), device(marks), weights).items():
        expected = np.zeros(gradient.shape)
        for index in np.ndindex(gradient.shape):
            moved = inputs[name].astype(np.float64)
            moved[index] += 1
            expected[index] = loss(inputs | {name: moved}) - loss(inputs)
        assert_close(gradient, expected)


def test_what_follows_the_end_does_not_matter():
    """Not even when it is not a number: the same values, the same gradients, and none there."""
    inputs, lengths = make_inputs(11, 4, batch=3), [0, 2, 7]
    weights, spoilt = make_weights(inputs), {k: v.copy() for k, v in inputs.items()}
    for row, end in enumerate(lengths):
        spoilt["x"][row, end:] = np.nan
    marks = {"lengths": jnp.array(lengths)}
    for function in (
        lambda inputs: conv(**inputs, **marks),
        lambda inputs: gradients_of(inputs, marks, weights),
    ):
        clean, other = (function(device(v)) for v in (inputs, spoilt))
        jax.tree.map(np.testing.assert_array_equal, other, clean)
    dx = np.asarray(other["x"])
    assert not any(dx[row, end:].any() for row, end in enumerate(lengths))


def test_documents_do_not_see_each_other():
    """The values and gradients of each are the same to the last bit, whatever the others hold."""
    # Two documents shorter than the convolution, and one that ends as such.
    assert_documents_apart(causal_conv, make_inputs(13, 4), [0, 4, 5, 11])


def assert_documents_apart(conv, inputs, starts):
    length, weights = inputs["x"].shape[1], make_weights(inputs)
    segment_ids = np.zeros((2, length), int)
    for start in starts[1:]:
        segment_ids[:, start:] += 1

    @jax.jit
    def with_gradients(inputs, weights):
        outputs, vjp = jax.vjp(lambda v: conv(**v, segment_ids=jnp.asarray(segment_ids)), inputs)
        return outputs, *vjp(weights)

    for first, end in zip(starts, [*starts[1:], length], strict=True):
        own, is_last = np.s_[:, first:end], end == length
        outside = np.ones((2, length), bool)
        outside[own] = False
        of_own = np.where(outside[:, :, None], 0, weights[0]), weights[1] * is_last

        def of_the_document(inputs, of_own=of_own, own=own, outside=outside, is_last=is_last):
            outputs = with_gradients(device(inputs), tuple(of_own))
            (y, final_inputs), gradients = jax.device_get(outputs)
            dx = gradients.pop("x")
            # That of a document which is not a number is none either, but stays within it.
            assert not dx[outside & np.isfinite(inputs["x"]).all(2)].any()
            return (y[own], dx[own], final_inputs if is_last else 0), gradients

        alone, shared = of_the_document(inputs)
        assert all(gradient.any() for gradient in shared.values())
        for factor in (-2, np.nan):
            changed = {k: v.copy() for k, v in inputs.items()}
            changed["x"][outside] *= np.float32(factor)
            alone_still, shared_still = of_the_document(changed)
            jax.tree.map(np.testing.assert_array_equal, alone_still, alone)
            # Gradients of the weight have no term of the others'.
            if np.isfinite(factor):
                jax.tree.map(np.testing.assert_array_equal, shared_still, shared)


def test_bfloat16():
    """Inputs and taps in bfloat16. The sum is rounded once, to 8 bits: at most 2**-8 of its size.
    silu is in this dtype, too."""
    inputs = {k: jnp.asarray(v, jnp.bfloat16) for k, v in make_inputs(11, 4).items()}
    marks = make_marks(2, 11)
    y, final_inputs = conv(**inputs, **device(marks))
    assert y.dtype == final_inputs.dtype == jnp.bfloat16
    total, expected_inputs = sums(
        **{k: np.asarray(v, np.float64) for k, v in inputs.items()}, **marks
    )
    expected_y = jax.jit(jax.nn.silu)(jnp.asarray(total, jnp.bfloat16))
    assert_close(y, np.asarray(expected_y, np.float64), 2**-8)
    np.testing.assert_array_equal(np.asarray(final_inputs, np.float64), expected_inputs)


def test_vmap():
    inputs = {k: jnp.stack([v, 2 * v]) for k, v in make_inputs(5, 4).items()}
    mapped = jax.jit(jax.vmap(lambda v: causal_conv(**v)))(inputs)
    for i in range(2):
        alone = conv(**{k: v[i] for k, v in inputs.items()})
        jax.tree.map(lambda m, a, i=i: np.testing.assert_array_equal(m[i], a), mapped, alone)
