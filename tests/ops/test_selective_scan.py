"""Every implementation of the selective scan against the recurrence in numpy, float64."""

from contextlib import contextmanager, nullcontext
from functools import cache, partial
from unittest.mock import patch

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import AbstractDevice, AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P
from jaxprs import stated_costs
from slow import slow_but

from hymba_jax.ops.platform import target_platform
from hymba_jax.ops.selective_scan import (
    pallas_gpu,
    pallas_tpu,
    selective_scan,
    selective_scan_step,
)
from hymba_jax.ops.selective_scan.api import FASTEST, IMPLEMENTATIONS

SEQUENCES = ("x", "dt", "B", "C", "z")
OF_ROWS = (*SEQUENCES, "initial_state")
OPTIONAL = ("D", "z", "dt_bias", "initial_state")
# Float32 rounds at 6e-8; sums of some hundred terms, relative to the largest entry.
FLOAT32 = 1e-5

# Positions that each implementation takes at a time; tests cross the borders between them.
CHUNK = {"associative": 32, "pallas_gpu": 64, "pallas_tpu": 256, "reference": 1, "xla": 16}


@contextmanager
def pallas_interpreter():
    """Runs a kernel as XLA operations, with NaN wherever nothing was written; its loops are not
    unrolled, so that it compiles faster."""
    rolled = patch.multiple(pallas_tpu, _UNROLL_ITERATIONS=1, _UNROLL_POSITIONS=1)
    with (
        patch.object(pl, "pallas_call", partial(pl.pallas_call, interpret=True)),
        patch.object(pallas_tpu, "_MAX_CHUNK", 48),
        patch.dict(CHUNK, pallas_tpu=48),
        rolled,
    ):
        yield


# What runs a kernel on a machine that it cannot be compiled for.
INTERPRETER = {
    "pallas_gpu": plgpu.force_gpu_interpret_mode,
    "pallas_tpu": pallas_interpreter,
}
INTERPRETER.pop(FASTEST.get(target_platform()), None)


@contextmanager
def short_chunks():
    """Of the GPU kernels, whose interpreter takes milliseconds for a position."""
    with patch.multiple(pallas_gpu, _CHUNK=8, _GROUP=4), patch.dict(CHUNK, pallas_gpu=8):
        yield


@pytest.fixture(params=sorted(IMPLEMENTATIONS))
def implementation(request):
    name = request.param
    shortened = short_chunks if name == "pallas_gpu" and name in INTERPRETER else nullcontext
    with INTERPRETER.get(name, nullcontext)(), shortened():
        yield name


@cache
def scan_of(implementation):
    """The same object every time, by which JAX knows what it has compiled."""
    return partial(selective_scan, implementation=implementation)


@pytest.fixture
def scan(implementation):
    return scan_of(implementation)


@partial(jax.jit, static_argnums=0)
def with_gradients(scan, inputs, marks, weights):
    """y and the final state, and the gradient of each input for these cotangents."""
    outputs, vjp = jax.vjp(lambda inputs: scan(**inputs, **marks), inputs)
    return outputs, *vjp(weights)


forward = jax.jit(lambda scan, inputs: scan(**inputs), static_argnums=0)


def make_inputs(batch, length, channels, state, without=()):
    rng = np.random.default_rng(length)
    inputs = {
        "x": rng.normal(size=(batch, length, channels)),
        "dt": rng.normal(size=(batch, length, channels)) - 1,
        "A": -np.exp(rng.normal(size=(state, channels))),
        "B": rng.normal(size=(batch, length, state)),
        "C": rng.normal(size=(batch, length, state)),
        "D": rng.normal(size=channels),
        "z": rng.normal(size=(batch, length, channels)),
        "dt_bias": rng.normal(size=channels),
        "initial_state": rng.normal(size=(batch, state, channels)),
    }
    # Values that float32 holds exactly, so that only the arithmetic differs.
    return {k: v.astype(np.float32) for k, v in inputs.items() if k not in without}


def make_marks(batch, length):
    """Rows of several documents, two of them of one position, and past the end of a row. Ids only
    differ from the one before."""
    starts = np.zeros((batch, length), bool)
    starts[-1, [length // 2, length // 2 + 1, length - 1]] = True
    starts[0] = starts[-1]
    lengths = np.arange(1, batch + 1) * length // batch
    return {"segment_ids": starts.cumsum(1) % 2, "lengths": lengths}


def documents_of(segment_ids):
    """The first position of each document of a row, and the one after its last."""
    starts = [t for t in range(1, len(segment_ids)) if segment_ids[t] != segment_ids[t - 1]]
    return zip([0, *starts], [*starts, len(segment_ids)], strict=True)


def oracle_of_rows(inputs, segment_ids=None, lengths=None):
    """Each document of each row alone, and of a row no more than its length."""
    batch, length = inputs["x"].shape[:2]
    segment_ids = np.zeros((batch, length)) if segment_ids is None else segment_ids
    lengths = [length] * batch if lengths is None else lengths
    y, h = np.zeros_like(inputs["x"]), []
    for row, end in enumerate(lengths):
        of_row = inputs | {k: v[row : row + 1] for k, v in inputs.items() if k in OF_ROWS}
        for first, last in documents_of(segment_ids[row, :end]):
            document = {k: v[:, first:last] for k, v in of_row.items() if k in SEQUENCES}
            y[row, first:last], of_last = (v[0] for v in oracle(**of_row | document))
        h.append(of_last)
    return y, np.stack(h)


def oracle(x, dt, A, B, C, D=None, z=None, dt_bias=None, initial_state=None, **marks):
    """The formula, one position after another in float64."""
    if marks:
        inputs = {"x": x, "dt": dt, "A": A, "B": B, "C": C, "D": D, "z": z}
        inputs |= {"dt_bias": dt_bias, "initial_state": initial_state}
        return oracle_of_rows({k: v for k, v in inputs.items() if v is not None}, **marks)
    delta = np.logaddexp(0, dt + (0 if dt_bias is None else dt_bias))
    h = np.zeros((len(x), *A.shape)) if initial_state is None else initial_state
    y = np.zeros_like(x)
    for t in range(x.shape[1]):
        decay = np.exp(delta[:, t, None, :] * A)
        h = decay * h + (delta[:, t] * x[:, t])[:, None, :] * B[:, t, :, None]
        y[:, t] = (h * C[:, t, :, None]).sum(1)
    if D is not None:
        y = y + D * x
    if z is not None:
        y = y * z / (1 + np.exp(-z))
    return y, h


def float64(inputs):
    return {k: np.asarray(v, np.float64) for k, v in inputs.items()}


def device(inputs, dtype=jnp.float32):
    return {k: jnp.asarray(v, dtype) for k, v in inputs.items()}


def on_device(marks):
    return {k: jnp.asarray(v) for k, v in marks.items()}


def loss_of(scan, weights):
    """A scalar that gives y and the final state different cotangents everywhere."""

    def loss(inputs):
        return sum((w * out).sum() for w, out in zip(weights, scan(**inputs), strict=True))

    return loss


def make_weights(batch, length, channels, state):
    rng = np.random.default_rng(1)
    shapes = (batch, length, channels), (batch, state, channels)
    return tuple(rng.normal(size=s).astype(np.float32) for s in shapes)


@jax.jit
def reference_gradients(inputs, marks, weights):
    scan = partial(selective_scan, **marks, implementation="reference")
    return jax.grad(loss_of(scan, weights))(inputs)


def gradients_in_float64(inputs, weights, **marks):
    """The reference implementation differentiated in float64: see `test_exact_gradients`."""
    with jax.enable_x64(True):
        weights = tuple(jnp.asarray(w, jnp.float64) for w in weights)
        gradients = reference_gradients(device(inputs, jnp.float64), on_device(marks), weights)
        return jax.tree.map(np.asarray, gradients)


@cache
def exact_gradients(sizes, without=(), marked=False):
    marks = make_marks(*sizes[:2]) if marked else {}
    return gradients_in_float64(make_inputs(*sizes, without), make_weights(*sizes), **marks)


def assert_close(actual, expected, relative=0.0, of_largest=FLOAT32):
    expected = np.asarray(expected)
    atol = of_largest * np.abs(expected).max()
    np.testing.assert_allclose(np.asarray(actual, np.float64), expected, rtol=relative, atol=atol)


def assert_all_close(actual, expected):
    """Of trees of arrays."""
    jax.tree.map(assert_close, actual, expected)


@pytest.mark.parametrize("marked", [False, True])
@pytest.mark.parametrize("name", sorted(make_inputs(1, 1, 1, 1)))
def test_exact_gradients(name, marked):
    """Float64 gradients equal central differences of the numpy oracle, entry by entry."""
    sizes = (2, 4, 3, 2)
    inputs, weights = float64(make_inputs(*sizes)), make_weights(*sizes)
    marks = make_marks(*sizes[:2]) if marked else {}
    gradient = exact_gradients(sizes, marked=marked)[name]
    loss, step = loss_of(partial(oracle, **marks), weights), 1e-6
    for index in np.ndindex(inputs[name].shape):
        values = []
        for sign in (1, -1):
            moved = inputs[name].copy()
            moved[index] += sign * step
            values.append(loss(inputs | {name: moved}))
        difference = (values[0] - values[1]) / (2 * step)
        assert gradient[index] == pytest.approx(difference, rel=1e-6, abs=1e-8)


def assert_conforms(scan, inputs, weights, gradients, **marks):
    """Values against the oracle and gradients against these."""
    outputs, actual = with_gradients(scan, device(inputs), on_device(marks), weights)
    assert_all_close(outputs, oracle(**float64(inputs), **marks))
    assert_all_close(actual, gradients)


# One position, part of a chunk, exactly one and two, two and a part; odd and even channels.
@pytest.mark.parametrize(
    ("chunks", "channels"),
    slow_but([(0, 5), (0.6, 5), (1, 5), (2, 5), (2.3, 5), (1.3, 130)], (2.3, 5)),
)
def test_forward_and_gradients(scan, implementation, chunks, channels):
    length = max(1, int(chunks * CHUNK[implementation]))
    sizes = (2, length, channels, 4)
    assert_conforms(scan, make_inputs(*sizes), make_weights(*sizes), exact_gradients(sizes))


@pytest.mark.parametrize(
    ("implementation", "channels"),
    [("pallas_tpu", 700), ("xla", 256)],
    indirect=["implementation"],
)
def test_blocks_of_channels(scan, channels):
    """Two of 384, the second in part, and more states than a tile has sublanes; two of 128."""
    sizes = (2, 5, channels, 12)
    assert_conforms(scan, make_inputs(*sizes), make_weights(*sizes), exact_gradients(sizes))


@pytest.mark.parametrize("implementation", ["pallas_tpu"], indirect=True)
def test_more_states_than_positions_of_an_iteration(scan):
    """And blocks and chunks that end with the channels and with the length."""
    sizes = (1, 32, 128, 20)
    assert_conforms(scan, make_inputs(*sizes), make_weights(*sizes), exact_gradients(sizes))
    assert_rounded(scan, sizes, SUMS_ON_TPUS)


@pytest.mark.parametrize("kind", ["TPU v4", "TPU v5 lite"])
@pytest.mark.parametrize("state", [4, 16, 48, 128, 600])
@pytest.mark.parametrize("length", [1, 16, 17, 255, 256, 257, 2176])
def test_chunks_of_tpus(length, state, kind, monkeypatch):
    """Whole iterations, of which only the last may be padding, and few enough for VMEM."""
    monkeypatch.setattr(pallas_tpu, "device_kind", lambda: kind)
    chunk = pallas_tpu._chunk(length, state)
    chunks = -(-length // chunk)
    assert chunk % 16 == 0
    assert chunks * chunk - length < 16 * chunks
    assert chunk <= (64 if kind == "TPU v4" else 256)
    assert chunk == 16 or chunk * state <= 256 * 32


@pytest.mark.parametrize("implementation", ["pallas_tpu"], indirect=True)
def test_mixed_dtypes_are_not_rounded(scan):
    """With B and C in float32 all sums are, though x is in bfloat16."""
    sizes = (1, 21, 5, 4)
    assert_rounded(scan, sizes, halved=("x", "dt", "z"))


@pytest.mark.parametrize("implementation", ["pallas_tpu"], indirect=True)
def test_groups_of_blocks(scan, monkeypatch):
    """Two of a block each, whose gradients of B and C are summed."""
    monkeypatch.setattr(pallas_tpu, "_MAX_GROUP", 1)
    sizes = (1, 5, 700, 4)
    assert_conforms(scan, make_inputs(*sizes), make_weights(*sizes), exact_gradients(sizes))


@pytest.mark.slow
def test_gpu_kernels_with_chunks_as_they_are():
    """The others have `short_chunks`."""
    sizes = (1, CHUNK["pallas_gpu"] + 6, 5, 4)
    with INTERPRETER.get("pallas_gpu", nullcontext)():
        scan = partial(selective_scan, implementation="pallas_gpu")
        assert_conforms(scan, make_inputs(*sizes), make_weights(*sizes), exact_gradients(sizes))


@pytest.mark.skipif("pallas_gpu" not in INTERPRETER, reason="races are found by the interpreter")
@pytest.mark.parametrize("copied", slow_but([256, 32], 256))
def test_gpu_blocks_of_a_cluster_do_not_race(copied, monkeypatch):
    """Two clusters of four blocks, three of them padding, and three chunks; the same bits again.
    Where copies take fewer entries of a row, as with many states, groups have several rows."""
    monkeypatch.setattr(pallas_gpu, "_COPIED", copied)
    sizes = (1, 19, 70, 4)
    inputs, weights = make_inputs(*sizes), make_weights(*sizes)
    scan = partial(selective_scan, implementation="pallas_gpu")
    with (
        plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)),
        short_chunks(),
    ):
        runs = [with_gradients(scan, device(inputs), {}, weights) for _ in range(2)]
    jax.tree.map(np.testing.assert_array_equal, *runs)
    assert_all_close(runs[0][1], exact_gradients(sizes))


def test_gpu_gradients_of_b_and_c_are_written_once_a_cluster():
    """Of four blocks of 32 channels, in float32, dB and dC alike; by what the kernel states."""
    batch, length, channels, state = 8, 128, 640, 16
    inputs = jax.eval_shape(lambda: device(make_inputs(batch, length, channels, state)))
    scan = partial(selective_scan, implementation="pallas_gpu")

    def gradients(inputs):
        outputs, vjp = jax.vjp(lambda inputs: scan(**inputs), inputs)
        return vjp(outputs)

    *_, backward = stated_costs(gradients, inputs)
    sequence, projection = batch * length * channels, batch * length * state
    states = state * channels
    once = 7 * sequence + 2 * projection  # x, dt, z, dy and the gradients of the first three; B, C
    once += batch * (length // 64 + 3) * states  # of chunks; dh, dA and that of the first
    once += states + (2 + 2 * batch) * channels  # A, D, the bias; the gradients of these two
    assert backward.bytes_accessed == 4 * (once + channels // 128 * 2 * projection)


def full_sizes(implementation):
    """Of a case of `test_forward_and_gradients`, which has compiled them."""
    return (2, int(2.3 * CHUNK[implementation]), 5, 4)


def marked_sizes(implementation):
    """Of the cases with documents, which share a program."""
    return (2, int(2.3 * CHUNK[implementation]) + 4, 6, 4)


def test_documents_and_lengths(scan, implementation):
    sizes = marked_sizes(implementation)
    inputs, weights, marks = make_inputs(*sizes), make_weights(*sizes), make_marks(*sizes[:2])
    assert_conforms(scan, inputs, weights, exact_gradients(sizes, marked=True), **marks)


def test_what_follows_the_end_does_not_matter(scan, implementation):
    """Not even when it is not a number: the same values, the same gradients, and none there."""
    sizes = marked_sizes(implementation)
    inputs, weights, marks = make_inputs(*sizes), make_weights(*sizes), make_marks(*sizes[:2])
    marks["segment_ids"][:] = 0
    past = np.arange(sizes[1]) >= marks["lengths"][:, None]
    spoilt = {k: v.copy() for k, v in inputs.items()}
    for name in SEQUENCES:
        spoilt[name][past] = np.nan
    clean, other = (
        with_gradients(scan, device(v), on_device(marks), weights) for v in (inputs, spoilt)
    )
    jax.tree.map(np.testing.assert_array_equal, other, clean)
    _, gradients = other
    assert not any(np.asarray(gradients[name])[past].any() for name in SEQUENCES)
    assert all(np.asarray(gradients[name])[~past].any() for name in SEQUENCES)


def assert_documents_apart(scan, inputs, weights, segment_ids, factors=(-2, np.nan)):
    """The values and gradients of each are the same to the last bit, whatever the others hold. Of
    what they share, the gradients are the document's own only while the others hold numbers. Rows
    have the same documents."""
    lengths = np.full(*segment_ids.shape)
    marks = on_device({"segment_ids": segment_ids, "lengths": lengths})
    documents = list(documents_of(segment_ids[0]))
    assert len(documents) > 2
    for first, end in documents:
        own, is_last = np.s_[:, first:end], end == segment_ids.shape[1]
        outside = np.ones(segment_ids.shape, bool)
        outside[own] = False
        of_own = np.where(outside[:, :, None], 0, weights[0]), weights[1] * is_last

        def of_the_document(inputs, of_own=of_own, own=own, outside=outside, is_last=is_last):
            outputs = with_gradients(scan, device(inputs), marks, of_own)
            (y, state), gradients = jax.device_get(outputs)
            sequences = {name: gradients.pop(name) for name in SEQUENCES}
            alone = y[own], *(gradient[own] for gradient in sequences.values())
            others = [gradient[outside] for gradient in sequences.values()]
            return (alone, state if is_last else 0), (gradients, others)

        alone, shared = of_the_document(inputs)
        assert all(gradient.any() for gradient in shared[0].values())
        assert not any(gradient.any() for gradient in shared[1])
        for factor in factors:
            changed = {k: v.copy() for k, v in inputs.items()}
            for name in SEQUENCES:
                changed[name][outside] *= np.float32(factor)
            alone_still, shared_still = of_the_document(changed)
            jax.tree.map(np.testing.assert_array_equal, alone_still, alone)
            if np.isfinite(factor):
                jax.tree.map(np.testing.assert_array_equal, shared_still, shared)


def test_documents_do_not_see_each_other(scan, implementation):
    """One of them is a single position, the one after it lies across the border of a chunk. The
    TPU kernels' sums have zeros for other positions, so that those have to be finite."""
    sizes = marked_sizes(implementation)
    segment_ids = np.zeros(sizes[:2], int)
    segment_ids[:, sizes[1] // 3] = 1
    factors = (-2,) if implementation == "pallas_tpu" else (-2, np.nan)
    assert_documents_apart(scan, make_inputs(*sizes), make_weights(*sizes), segment_ids, factors)


# Kernels, and what CPUs use.
QUICK = slow_but(sorted(IMPLEMENTATIONS), "pallas_gpu", "pallas_tpu", "xla")


@pytest.mark.parametrize("implementation", QUICK, indirect=True)
@pytest.mark.parametrize(
    "without",
    [
        *(pytest.param(some, marks=pytest.mark.slow) for some in (OPTIONAL[:2], OPTIONAL[2:])),
        OPTIONAL,
    ],
)
def test_optional_inputs(scan, without):
    """The last case has documents, which then start from zeros."""
    sizes, marked = (2, 11, 6, 3), without == OPTIONAL
    inputs, weights = make_inputs(*sizes, without), make_weights(*sizes)
    marks = make_marks(*sizes[:2]) if marked else {}
    assert_conforms(scan, inputs, weights, exact_gradients(sizes, without, marked), **marks)


@pytest.mark.parametrize("implementation", QUICK, indirect=True)
def test_bfloat16(scan, implementation):
    """Arithmetic in float32, so the only error beyond it is the rounding of each result to
    8 bits, 2**-9 of its size; a bound of 2**-8 leaves a result on the edge its neighbour. TPUs'
    sums over states and channels round both factors, too."""
    assert_rounded(scan, (2, 19, 6, 4), SUMS_ON_TPUS if implementation == "pallas_tpu" else ())


@pytest.mark.parametrize("implementation", ["pallas_tpu"], indirect=True)
def test_bfloat16_in_several_chunks(scan, implementation):
    """Of documents, with as many states as the models have and channels whose roundings average."""
    sizes = (1, 2 * CHUNK[implementation] + 21, 130, 16)
    assert_rounded(scan, sizes, SUMS_ON_TPUS, **make_marks(*sizes[:2]))


# Results of sums whose factors TPUs round. Neither the states nor their gradients are among them.
SUMS_ON_TPUS = ("y", "B", "C", "dt", "dt_bias", "x", "z")


def assert_rounded(scan, sizes, sums=(), halved=("x", "dt", "B", "C", "z"), **marks):
    """Bfloat16 inputs give the results of these numbers in float64, rounded.

    Args:
      sums: results whose terms are rounded, too: each by 2**-8 at most, which is as much as they
        may be off in root mean square.
      halved: the inputs in bfloat16.
    """

    def assert_result(name, actual, expected):
        if name in sums:
            error = np.asarray(actual, np.float64) - expected
            assert np.square(error).mean() < np.square(2**-8 * np.asarray(expected)).mean(), name
        else:
            assert_close(actual, expected, relative=2**-8 if name in ("y", *halved) else 0)

    inputs, (of_y, of_state) = make_inputs(*sizes), make_weights(*sizes)
    low = {
        k: jnp.asarray(v, jnp.bfloat16 if k in halved else jnp.float32) for k, v in inputs.items()
    }
    of_y = jnp.asarray(of_y, jnp.bfloat16)
    (y, final_state), gradients = with_gradients(scan, low, on_device(marks), (of_y, of_state))
    assert y.dtype == jnp.bfloat16
    assert final_state.dtype == jnp.float32
    expected_y, expected_state = oracle(**float64(low), **marks)
    assert_result("y", y, expected_y)
    assert_close(final_state, expected_state)

    exact = gradients_in_float64(float64(low), (of_y, of_state), **marks)
    for name, gradient in gradients.items():
        assert gradient.dtype == low[name].dtype
        assert_result(name, gradient, exact[name])


# Two halves are one program.
@pytest.mark.parametrize("share", slow_but([0.01, 0.4, 0.5, 0.7], 0.5))
def test_two_calls_equal_one(scan, implementation, share):
    length = 2 * (int(1.3 * CHUNK[implementation]) + 1)
    inputs, cut = make_inputs(2, length, 6, 4), max(1, int(share * length))
    first = inputs | {k: inputs[k][:, :cut] for k in SEQUENCES}
    second = inputs | {k: inputs[k][:, cut:] for k in SEQUENCES}
    y1, state = forward(scan, device(first))
    y2, last = forward(scan, device(second) | {"initial_state": state})
    assert_all_close((jnp.concatenate([y1, y2], axis=1), last), oracle(**float64(inputs)))


def make_layers(sizes):
    """Inputs that differ, one after the other and stacked, and the exact gradients of all."""
    inputs = make_inputs(*sizes)
    layers = [inputs, {k: v * np.float32(0.5) for k, v in inputs.items()}]
    gradients = [gradients_in_float64(layer, make_weights(*sizes)) for layer in layers]
    return layers, *(jax.tree.map(lambda *v: np.stack(v), *trees) for trees in (layers, gradients))


# A kernel, whose grid gets another axis; the others are as alike here as anywhere.
@pytest.mark.parametrize(
    "implementation", slow_but(sorted(IMPLEMENTATIONS), "pallas_tpu"), indirect=True
)
def test_vmap(scan):
    sizes = (2, 11, 6, 3)
    layers, stacked, gradients = make_layers(sizes)
    mapped = jax.vmap(lambda inputs: with_gradients(scan, inputs, {}, make_weights(*sizes)))
    outputs, actual = mapped(device(stacked))
    for i, layer in enumerate(layers):
        assert_all_close(tuple(v[i] for v in outputs), oracle(**float64(layer)))
    assert_all_close(actual, gradients)


def loss_of_layers(loss):
    """The loss summed over stacked layers, each of them rematerialised."""

    def summed(stacked):
        step = jax.checkpoint(lambda total, layer: (total + loss(layer), None))
        return jax.lax.scan(step, jnp.zeros(()), stacked)[0]

    return summed


# What CPUs use; of kernels, whether they lower: see below.
@pytest.mark.parametrize("implementation", slow_but(sorted(IMPLEMENTATIONS), "xla"), indirect=True)
def test_rematerialised_in_a_scan_over_layers(scan, implementation):
    if implementation == "pallas_gpu" and implementation in INTERPRETER:
        pytest.skip("the interpreter of GPU kernels calls Python, which stops rematerialisation")
    sizes = (2, 11, 6, 3)
    layers, stacked, gradients = make_layers(sizes)
    weights = make_weights(*sizes)
    summed = loss_of_layers(loss_of(scan, weights))
    value, actual = jax.jit(jax.value_and_grad(summed))(device(stacked))
    exact = loss_of(oracle, weights)
    assert_close(value, sum(exact(float64(layer)) for layer in layers))
    assert_all_close(actual, gradients)


# One block of channels; six, which no fetch can be shared among equally.
@pytest.mark.parametrize(
    ("channels", "states"),
    slow_but([(6, 3), (96, 3), (96, 48), (128, 64), (6, 64)], (6, 64)),
)
def test_gpu_kernels_lower_when_rematerialised(channels, states):
    """Forward, forward again and backward, as far as a machine without a GPU goes."""
    sizes = (2, 11, channels, states)
    stacked = {k: jnp.stack([v, v]) for k, v in device(make_inputs(*sizes)).items()}
    loss = loss_of(partial(selective_scan, implementation="pallas_gpu"), make_weights(*sizes))
    traced = jax.jit(jax.value_and_grad(loss_of_layers(loss))).trace(stacked)
    lowered = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert lowered.count("custom_call @mosaic_gpu") == 3


@pytest.mark.parametrize("implementation", ["associative", "xla"])
def test_derivatives_of_gradients(scan):
    """Along one direction, against those of the definition."""
    sizes = (2, 37, 6, 3)
    inputs, rng = device(make_inputs(*sizes)), np.random.default_rng(3)
    direction = device({name: 0.1 * rng.normal(size=v.shape) for name, v in inputs.items()})

    def derivative(scan):
        gradient = jax.grad(loss_of(scan, make_weights(*sizes)))
        return jax.jit(lambda *args: jax.jvp(gradient, args[:1], args[1:])[1])(inputs, direction)

    assert_all_close(derivative(scan), derivative(scan_of("reference")))


def test_a_time_step_of_zero_changes_nothing(scan, implementation):
    """To the last bit, however often it is taken."""
    sizes = full_sizes(implementation)
    inputs = device(make_inputs(*sizes))
    inputs["dt"] = jnp.full_like(inputs["dt"], -jnp.inf)
    (_, final_state), _ = with_gradients(scan, inputs, {}, make_weights(*sizes))
    np.testing.assert_array_equal(final_state, inputs["initial_state"])


def test_fast_decay_underflows_to_zero(scan, implementation):
    """exp(delta A) far below the smallest float32 forgets the state and gives no NaN."""
    sizes = full_sizes(implementation)
    inputs = device(make_inputs(*sizes))
    inputs["A"] = jnp.full_like(inputs["A"], -1e6)
    _, gradients = with_gradients(scan, inputs, {}, make_weights(*sizes))
    assert not np.any(gradients["initial_state"])
    assert all(np.isfinite(g).all() for g in gradients.values())


@pytest.mark.parametrize("without", [(), OPTIONAL[:3]])
def test_steps_equal_the_scan(without):
    inputs = make_inputs(2, 7, 6, 4, without)
    expected_y, expected_state = oracle(**float64(inputs))
    state, step = jnp.asarray(inputs.pop("initial_state")), jax.jit(selective_scan_step)
    for t in range(7):
        now = {k: v[:, t] if k in SEQUENCES else v for k, v in device(inputs).items()}
        y, state = step(**now, state=state)
        assert_close(y, expected_y[:, t])
    assert_close(state, expected_state)


@pytest.mark.parametrize(
    ("without", "documents", "lengths"),
    [((), True, False), ((), False, True), (OPTIONAL, True, True), (OPTIONAL, False, False)],
)
def test_one_position_is_a_step(without, documents, lengths):
    """Chosen by itself, with no loop around it."""
    inputs = device(make_inputs(3, 1, 6, 4, without))
    if documents:
        inputs["segment_ids"] = jnp.asarray([[0], [1], [1]])
    if lengths:
        inputs["lengths"] = jnp.asarray([1, 0, 0])
    actual = jax.jit(selective_scan)(**inputs)
    expected = jax.jit(scan_of("reference"))(**inputs)
    for a, b in zip(actual, expected, strict=True):
        assert_close(a, b)
    assert "while" not in jax.jit(selective_scan).lower(**inputs).as_text()


@pytest.mark.skipif(target_platform() != "cpu", reason="says so of CPUs")
@pytest.mark.parametrize("kernel", sorted(INTERPRETER))
def test_a_kernel_fails_loudly_where_it_cannot_run(kernel):
    with pytest.raises(ValueError, match="Only interpret mode is supported on CPU backend"):
        selective_scan(**device(make_inputs(1, 2, 3, 2)), implementation=kernel)


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize(
    ("platform", "expected"), [("cpu", "xla"), ("tpu", "pallas_tpu"), ("gpu", "pallas_gpu")]
)
def test_choice_by_what_is_compiled_for(monkeypatch, platform, expected, devices):
    """Given the rows of a device, whether the mesh splits them or a `shard_map` around it has."""
    chosen = []

    def record(name, scan, x, **inputs):
        chosen.append((name, len(x)))
        return scan(x, **inputs)

    reference = IMPLEMENTATIONS["reference"]
    for name in IMPLEMENTATIONS:
        monkeypatch.setitem(IMPLEMENTATIONS, name, partial(record, name, reference))
    kind = AbstractDevice(device_kind="any", num_cores=None, platform=platform)
    mesh = AbstractMesh((devices,), ("data",), (AxisType.Auto,), abstract_device=kind)
    inputs = device(make_inputs(8, 4, 3, 2, without=OPTIONAL))
    with jax.sharding.use_abstract_mesh(mesh):
        jax.eval_shape(lambda v: selective_scan(**v), inputs)
        in_shard_map = jax.shard_map(
            lambda v: selective_scan(**v), in_specs=P(), out_specs=P(), check_vma=False
        )
        jax.eval_shape(in_shard_map, inputs)
    assert chosen == [(expected, 8 // devices), (expected, 8)]


def test_unknown_implementation():
    inputs = device(make_inputs(1, 2, 3, 2))
    with pytest.raises(ValueError, match=r"unknown .*'cuda'; choose from .*'xla'"):
        selective_scan(**inputs, implementation="cuda")
