"""The kernels of the causal convolution for GPUs, in Pallas's interpreter, against numpy in
float64."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from interpreter import interpret_kernels
from jax.sharding import AbstractDevice, AbstractMesh, AxisType
from slow import slow_but
from test_causal_conv import dsilu, silu

from hymba_jax.config.parallel import ParallelConfig
from hymba_jax.ops.causal_conv import causal_conv
from hymba_jax.ops.causal_conv.pallas_gpu import MIN_SEGMENT
from hymba_jax.ops.causal_conv.reference import causal_conv_reference
from hymba_jax.parallel.mesh import make_mesh

# Of the largest: sums of a few hundred terms, rounded at 6e-8; two roundings to 8 bits, of the sum
# that silu is applied to, whose slope is at most 1.1, and of the result.
TOLERANCE = {"float32": 1e-5, "bfloat16": 2**-7}
BORDER = MIN_SEGMENT  # between programs, of such short rows
LENGTH = 2 * BORDER + 13  # the end of a program's positions that is not a whole group


@pytest.fixture
def kernels(monkeypatch):
    """What GPUs run; the names of those that were called."""
    called = interpret_kernels(monkeypatch)
    monkeypatch.setattr("hymba_jax.ops.causal_conv.api.target_platform", lambda: "gpu")
    return called


def make_inputs(length, taps, channels, dtype="float32", batch=2):
    rng = np.random.default_rng(length + taps)
    shapes = {
        "x": (batch, length, channels),
        "weight": (taps, channels),
        "bias": (channels,),
        "initial_inputs": (batch, taps - 1, channels),
    }
    return {name: jnp.asarray(rng.normal(size=shape), dtype) for name, shape in shapes.items()}


def make_documents(length, starts):
    """Ids of rows, given where documents start."""
    is_start = np.zeros((len(starts), length), int)
    for row, positions in enumerate(starts):
        is_start[row, positions] = 1
    return is_start.cumsum(1)


def by_hand(inputs, dy, segment_ids=None, lengths=None):
    """The values and the gradient of each input: one position and tap after another."""
    x, weight, bias, initial = (np.asarray(v, np.float64) for v in inputs.values())
    before = len(weight) - 1
    y = np.zeros(x.shape)
    gradients = {name: np.zeros(v.shape) for name, v in inputs.items()}
    for row in range(len(x)):
        start = 0
        for t in range(x.shape[1] if lengths is None else lengths[row]):
            if segment_ids is not None and t and segment_ids[row, t] != segment_ids[row, t - 1]:
                start = t
            sources = []
            for position in range(t - before, t + 1):
                is_own = position >= start
                index = position if is_own else before + position - start
                sources.append(("x" if is_own else "initial_inputs", (row, index)))
            taken = np.stack(
                [{"x": x, "initial_inputs": initial}[name][at] for name, at in sources]
            )
            total = bias + (weight * taken).sum(0)
            y[row, t] = silu(total)
            dtotal = dy[row, t] * dsilu(total)
            gradients["bias"] += dtotal
            gradients["weight"] += dtotal * taken
            for (name, at), tap in zip(sources, weight, strict=True):
                gradients[name][at] += dtotal * tap
    return y, gradients


def with_gradients(inputs, dy, **marks):
    y, vjp = jax.vjp(lambda inputs: causal_conv(**inputs, **marks)[0], inputs)
    return y, *vjp(dy)


def assert_as_by_hand(inputs, dtype="float32", **marks):
    dy = jnp.asarray(np.random.default_rng(1).normal(size=inputs["x"].shape), dtype)
    on_device = {name: jnp.asarray(mark) for name, mark in marks.items()}
    y, gradients = jax.jit(with_gradients)(inputs, dy, **on_device)
    expected_y, expected = by_hand(inputs, np.asarray(dy, np.float64), **marks)
    assert_close(y, expected_y, dtype)
    for name, gradient in gradients.items():
        assert_close(gradient, expected[name], dtype)


def assert_close(actual, expected, dtype):
    assert actual.dtype == dtype
    atol = TOLERANCE[dtype] * np.abs(expected).max()
    np.testing.assert_allclose(np.asarray(actual, np.float64), expected, rtol=0, atol=atol)


# Shorter than the taps; at the borders of programs, and around them; at both ends of a row.
STARTS = [[2, 3, BORDER - 1, BORDER, BORDER + 2, LENGTH - 1], [0, 1, 70, 2 * BORDER]]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("taps", "channels", "documents"),
    slow_but(
        [(4, 130, False), (4, 130, True), (2, 16, False), (2, 16, True)],
        (4, 130, True),
        (2, 16, False),
    ),
)
def test_values_and_gradients(kernels, taps, channels, documents, dtype):
    """Several programs for positions, and several or a part of one for channels."""
    inputs = make_inputs(LENGTH, taps, channels, dtype)
    marks = {"segment_ids": make_documents(LENGTH, STARTS)} if documents else {}
    assert_as_by_hand(inputs, dtype, **marks)
    assert kernels == ["causal_conv_forward", "causal_conv_backward"]


@pytest.mark.parametrize("length", slow_but([2, 3, 8, BORDER, BORDER + 1], 2, 8, BORDER + 1))
def test_lengths(kernels, length):
    """Shorter than the taps, a group of positions, all of a program, and one more."""
    assert_as_by_hand(make_inputs(length, 4, 16))
    assert kernels


def test_padding(kernels):
    """Behind the end of a row, the result is zero and the gradient as well, whatever is there."""
    lengths = np.array([0, 3, BORDER, BORDER + 9])
    inputs = make_inputs(LENGTH, 4, 16, batch=4)
    is_padding = np.arange(LENGTH) >= lengths[:, None]
    inputs["x"] = jnp.where(is_padding[:, :, None], jnp.nan, inputs["x"])
    segment_ids = make_documents(LENGTH, STARTS + STARTS)
    assert_as_by_hand(inputs, lengths=lengths, segment_ids=segment_ids)
    assert kernels


def test_without_initial_inputs(kernels):
    """They are zeros, as are those of every document."""
    inputs = make_inputs(BORDER, 4, 16)
    inputs["initial_inputs"] = jnp.zeros_like(inputs["initial_inputs"])
    segment_ids = jnp.asarray(make_documents(BORDER, [[5], [9]]))
    expected, _ = by_hand(inputs, np.zeros(inputs["x"].shape), segment_ids)
    del inputs["initial_inputs"]
    assert_close(causal_conv(**inputs, segment_ids=segment_ids)[0], expected, "float32")
    assert kernels


@pytest.mark.parametrize(("length", "taps"), [(1, 4), (9, 1), (9, 9)])
def test_what_xla_computes(kernels, length, taps):
    """A single position with documents, one tap, and too many for registers."""
    x, segment_ids = jnp.ones((1, length, 16)), jnp.zeros((1, length), int)
    convolved = partial(causal_conv, segment_ids=segment_ids)
    jax.eval_shape(convolved, x, jnp.ones((taps, 16)), jnp.ones(16))
    assert not kernels


def test_on_shards(kernels):
    """Of rows and of channels."""
    mesh = make_mesh(jax.devices("cpu")[:8], ParallelConfig(data=2, fsdp=2, tensor=2))
    inputs = make_inputs(20, 4, 32, batch=4)
    with jax.set_mesh(mesh):
        assert_as_by_hand(inputs, segment_ids=make_documents(20, [[3], [8], [], [1]]))
    assert set(kernels) == {"causal_conv_forward", "causal_conv_backward"}


@pytest.mark.parametrize(("length", "lengths"), [(8, None), (32, [32, 5])])
def test_a_sharded_length_is_left_to_xla(kernels, length, lengths):
    """Shards shorter than the taps, and padded rows."""
    mesh = make_mesh(jax.devices("cpu")[:8], ParallelConfig(data=2, sequence=4))
    marks = {} if lengths is None else {"lengths": np.array(lengths)}
    with jax.set_mesh(mesh):
        assert_as_by_hand(make_inputs(length, 4, 16, batch=2), **marks)
    assert not kernels


class TestRematerialised:
    @pytest.mark.parametrize(("kept", "forward"), [("activation", 1), ("norm", 2)])
    def test_what_is_kept_is_not_computed_again(self, kernels, kept, forward):
        """`compute.remat` "activations", and "dots"."""
        inputs = make_inputs(20, 4, 16)
        text = str(jax.make_jaxpr(jax.grad(self.loss_with(causal_conv, kept)))(inputs))
        assert text.count("name=causal_conv_forward") == forward
        assert text.count("name=causal_conv_backward") == 1

    def test_gradients(self, kernels):
        inputs = make_inputs(20, 4, 16)
        for kept in ("activation", "norm"):
            gradients = jax.jit(jax.grad(self.loss_with(causal_conv, kept)))(inputs)
            y, _ = by_hand(inputs, np.zeros(inputs["x"].shape))
            _, expected = by_hand(inputs, 2 * y)
            for name, gradient in gradients.items():
                assert_close(gradient, expected[name], "float32")

    def test_the_reference_is_named_too(self):
        inputs = make_inputs(20, 4, 16)
        text = str(jax.make_jaxpr(partial(causal_conv_reference, **inputs))())
        assert "name=activation" in text

    def loss_with(self, conv, kept):
        policy = jax.checkpoint_policies.save_only_these_names(kept)

        def loss(inputs):
            return jnp.square(conv(**inputs)[0]).sum()

        return jax.checkpoint(loss, policy=policy)


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")
@pytest.mark.parametrize("documents", [False, True])
def test_lowers_for_gpus(documents):
    """As far as a machine without one goes."""
    device = AbstractDevice(device_kind="NVIDIA H100", num_cores=132, platform="gpu")
    mesh = AbstractMesh((1,), ("data",), (AxisType.Auto,), abstract_device=device)
    inputs = make_inputs(LENGTH, 4, 130, "bfloat16")
    marks = {"segment_ids": make_documents(LENGTH, STARTS)} if documents else {}
    with jax.sharding.use_abstract_mesh(mesh):
        traced = jax.jit(with_gradients).trace(inputs, inputs["x"], **marks)
        lowered = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert lowered.count("custom_call @__gpu$xla.gpu.triton") == 2
