"""Every implementation of the SSD recurrence against the formula in numpy, float64."""

from contextlib import contextmanager, nullcontext
from functools import cache, partial
from unittest.mock import patch

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, NamedSharding
from slow import slow_but
from test_selective_scan import (
    FLOAT32,
    assert_all_close,
    assert_close,
    device,
    documents_of,
    float64,
    forward,
    loss_of,
    make_marks,
    on_device,
    with_gradients,
)

from hymba_jax.config.parallel import ParallelConfig
from hymba_jax.ops.platform import target_platform
from hymba_jax.ops.ssd import pallas_tpu, ssd, ssd_step
from hymba_jax.ops.ssd.api import IMPLEMENTATIONS
from hymba_jax.ops.ssd.chunked import _CHUNK
from hymba_jax.parallel.mesh import make_mesh

SEQUENCES = ("x", "dt", "B", "C")
OF_ROWS = (*SEQUENCES, "initial_state")
OPTIONAL = ("D", "dt_bias", "initial_state")
SMALL = (2, 11, 4, 2, 3, 5)  # batch, length, heads, groups, channels of a head, states
LONG = (2, int(2.3 * _CHUNK), 4, 2, 3, 5)


@contextmanager
def pallas_interpreter():
    """Runs a kernel as XLA operations, with NaN wherever nothing was written, in short chunks and
    few wide heads. XLA:CPU has no matmuls of bfloat16 that are summed in float32; products of two
    are exact in float32."""

    def dot(a, b, contracted=(1, 0)):
        return exact(a.astype(jnp.float32), b.astype(jnp.float32), contracted)

    exact = pallas_tpu.kernel_dot
    smaller = patch.multiple(pallas_tpu, _CHUNK=_CHUNK, _ROWS=64, kernel_dot=dot)
    with patch.object(pl, "pallas_call", partial(pl.pallas_call, interpret=True)), smaller:
        yield


# What runs a kernel on a machine that it cannot be compiled for.
INTERPRETER = {"pallas_tpu": pallas_interpreter}
if target_platform() == "tpu":
    INTERPRETER.clear()
# Kernels round operands of matmuls to bfloat16, by 2**-9 of each; of two of them, in two matmuls
# one behind the other, relative to the largest entry.
ROUNDED_OPERANDS = {"pallas_tpu": 2**-7}


# Those that take float32: `test_ssd_pallas_gpu` has the other.
IN_FLOAT32 = sorted(IMPLEMENTATIONS.keys() - {"pallas_gpu"})


@pytest.fixture(params=slow_but(IN_FLOAT32, "chunked", "pallas_tpu"))
def implementation(request):
    with INTERPRETER.get(request.param, nullcontext)():
        yield request.param


# The reference in float64 is what the others' gradients are compared with.
@pytest.fixture
def scan(implementation):
    return scan_of(implementation)


@cache
def scan_of(implementation):
    return partial(ssd, implementation=implementation)


def make_inputs(batch, length, heads, groups, head_dim, state, without=()):
    rng = np.random.default_rng(length)
    inputs = {
        "x": rng.normal(size=(batch, length, heads, head_dim)),
        "dt": rng.normal(size=(batch, length, heads)) - 2,
        "A": -np.exp(rng.normal(size=heads)),
        "B": rng.normal(size=(batch, length, groups, state)),
        "C": rng.normal(size=(batch, length, groups, state)),
        "D": rng.normal(size=heads),
        "dt_bias": rng.normal(size=heads),
        "initial_state": rng.normal(size=(batch, heads, head_dim, state)),
    }
    return {k: v.astype(np.float32) for k, v in inputs.items() if k not in without}


def make_weights(batch, length, heads, groups, head_dim, state):
    """Different cotangents of every entry of y and of the final state."""
    rng = np.random.default_rng(1)
    shapes = (batch, length, heads, head_dim), (batch, heads, head_dim, state)
    return tuple(rng.normal(size=s).astype(np.float32) for s in shapes)


def oracle(x, dt, A, B, C, D=None, dt_bias=None, initial_state=None, **marks):
    """The formula, one position, head and row after another in float64."""
    if marks:
        inputs = {"x": x, "dt": dt, "A": A, "B": B, "C": C, "D": D}
        inputs |= {"dt_bias": dt_bias, "initial_state": initial_state}
        return oracle_of_rows({k: v for k, v in inputs.items() if v is not None}, **marks)
    batch, length, heads, head_dim = x.shape
    groups, state = B.shape[2:]
    h = np.zeros((batch, heads, head_dim, state)) if initial_state is None else initial_state.copy()
    y = np.zeros_like(x)
    for row, t, head in np.ndindex(batch, length, heads):
        group = head // (heads // groups)
        delta = np.logaddexp(0, dt[row, t, head] + (0 if dt_bias is None else dt_bias[head]))
        own = h[row, head]
        own *= np.exp(delta * A[head])
        own += delta * np.outer(x[row, t, head], B[row, t, group])
        y[row, t, head] = own @ C[row, t, group]
        if D is not None:
            y[row, t, head] += D[head] * x[row, t, head]
    return y, h


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


def gradients_in_float64(inputs, weights, **marks):
    """The reference differentiated in float64: see `test_exact_gradients`."""
    with jax.enable_x64(True):
        loss = loss_of(partial(ssd, **on_device(marks), implementation="reference"), weights)
        gradients = jax.jit(jax.grad(loss))(device(inputs, jnp.float64))
        return jax.tree.map(np.asarray, gradients)


@cache
def exact_gradients(sizes, without=(), marked=False):
    marks = make_marks(*sizes[:2]) if marked else {}
    return gradients_in_float64(make_inputs(*sizes, without), make_weights(*sizes), **marks)


@pytest.mark.parametrize("marked", [False, True])
def test_exact_gradients(marked):
    """Float64 gradients equal central differences of the numpy oracle, along a random direction
    of each input."""
    sizes, step = (2, 6, 2, 1, 2, 3), 1e-6
    inputs, weights = float64(make_inputs(*sizes)), make_weights(*sizes)
    marks = make_marks(*sizes[:2]) if marked else {}
    loss, rng = loss_of(partial(oracle, **marks), weights), np.random.default_rng(3)
    for name, gradient in exact_gradients(sizes, marked=marked).items():
        along = rng.normal(size=gradient.shape)
        up, down = (loss(inputs | {name: inputs[name] + s * along}) for s in (step, -step))
        expected = (up - down) / (2 * step)
        assert (gradient * along).sum() == pytest.approx(expected, rel=1e-6, abs=1e-8), name


def assert_conforms(scan, inputs, weights, gradients, **marks):
    """Values against the oracle and gradients against these."""
    outputs, actual = with_gradients(scan, device(inputs), on_device(marks), weights)
    assert_all_close(outputs, oracle(**float64(inputs), **marks))
    assert_all_close(actual, gradients)


# Others of these tests have the values and gradients of kernels.
one_by_default = pytest.mark.parametrize(
    "implementation", slow_but(sorted(IMPLEMENTATIONS), "chunked"), indirect=True
)


# One position, part of a chunk, exactly one and two, two and a part; one group and several.
@pytest.mark.parametrize(
    ("length", "groups"),
    slow_but(
        [(1, 2), (40, 1), (_CHUNK, 2), (2 * _CHUNK, 4), (int(2.3 * _CHUNK), 1)],
        (int(2.3 * _CHUNK), 1),
    ),
)
@one_by_default
def test_forward_and_gradients(scan, length, groups):
    sizes = (2, length, 4, groups, 3, 5)
    assert_conforms(scan, make_inputs(*sizes), make_weights(*sizes), exact_gradients(sizes))


def test_documents_and_lengths(scan):
    inputs, weights, marks = make_inputs(*LONG), make_weights(*LONG), make_marks(*LONG[:2])
    assert_conforms(scan, inputs, weights, exact_gradients(LONG, marked=True), **marks)


def test_what_follows_the_end_does_not_matter(scan):
    """Not even when it is not a number: the same values, the same gradients, and none there."""
    inputs, weights, marks = make_inputs(*LONG), make_weights(*LONG), make_marks(*LONG[:2])
    marks["segment_ids"][:] = 0
    past = np.arange(LONG[1]) >= marks["lengths"][:, None]
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


def test_documents_do_not_see_each_other(scan):
    """Values and gradients of one are the same to the last bit, whatever numbers the others hold;
    it is in two chunks, and so are those before and after it."""
    inputs, (of_y, of_state) = make_inputs(*LONG), make_weights(*LONG)
    first, end = _CHUNK // 2, _CHUNK + _CHUNK // 2
    outside = np.ones(LONG[:2], bool)
    outside[:, first:end] = False
    positions = np.broadcast_to(np.arange(LONG[1]), LONG[:2])
    segment_ids = np.digitize(positions, [first // 2, first, end, end + 1])
    # As documents with lengths are marked, so that this is no other program.
    marks = on_device({"segment_ids": segment_ids, "lengths": np.full(LONG[0], LONG[1])})
    weights = np.where(outside[..., None, None], 0, of_y), np.zeros_like(of_state)
    changed = {k: v.copy() for k, v in inputs.items()}
    for name in SEQUENCES:
        changed[name][outside] *= np.float32(-3)
    (y, _), gradients = with_gradients(scan, device(inputs), marks, weights)
    (other_y, _), other_gradients = with_gradients(scan, device(changed), marks, weights)
    np.testing.assert_array_equal(y[~outside], other_y[~outside])
    assert (y[outside] != other_y[outside]).any()
    jax.tree.map(np.testing.assert_array_equal, gradients, other_gradients)
    assert all(np.asarray(gradient).any() for gradient in gradients.values())
    assert not any(np.asarray(gradients[name])[outside].any() for name in SEQUENCES)


@one_by_default
def test_optional_inputs(scan):
    """With documents, which then start from zeros."""
    inputs, weights, marks = (
        make_inputs(*SMALL, OPTIONAL),
        make_weights(*SMALL),
        make_marks(*SMALL[:2]),
    )
    assert_conforms(scan, inputs, weights, exact_gradients(SMALL, OPTIONAL, True), **marks)


def test_bfloat16(scan, implementation):
    """Arithmetic in float32: beyond its error is the rounding of each result to 8 bits, 2**-9 of
    its size; a bound of 2**-8 leaves a result on the edge its neighbour."""
    inputs, (of_y, of_state) = make_inputs(*SMALL), make_weights(*SMALL)
    low = {
        k: jnp.asarray(v, jnp.bfloat16 if k in SEQUENCES else jnp.float32)
        for k, v in inputs.items()
    }
    of_y = jnp.asarray(of_y, jnp.bfloat16)
    close = partial(assert_close, of_largest=ROUNDED_OPERANDS.get(implementation, FLOAT32))
    (y, state), gradients = with_gradients(scan, low, {}, (of_y, of_state))
    assert (y.dtype, state.dtype) == (jnp.bfloat16, jnp.float32)
    expected_y, expected_state = oracle(**float64(low))
    close(y, expected_y, relative=2**-8)
    close(state, expected_state)
    exact = gradients_in_float64(float64(low), (of_y, of_state))
    for name, gradient in gradients.items():
        assert gradient.dtype == low[name].dtype
        close(gradient, exact[name], relative=2**-8 if name in SEQUENCES else 0)


def test_two_calls_equal_one(scan):
    """The second starts from the state of the first, inside a chunk."""
    length = 2 * (_CHUNK // 2 + 5)
    inputs, cut = make_inputs(2, length, 4, 2, 3, 5), length // 2
    first = inputs | {k: inputs[k][:, :cut] for k in SEQUENCES}
    second = inputs | {k: inputs[k][:, cut:] for k in SEQUENCES}
    y1, state = forward(scan, device(first))
    y2, last = forward(scan, device(second) | {"initial_state": state})
    assert_all_close((jnp.concatenate([y1, y2], axis=1), last), oracle(**float64(inputs)))


def test_a_time_step_of_zero_changes_nothing(scan):
    """To the last bit, however often it is taken."""
    inputs = device(make_inputs(*LONG))
    inputs["dt"] = jnp.full_like(inputs["dt"], -jnp.inf)
    (_, final_state), _ = with_gradients(scan, inputs, {}, make_weights(*LONG))
    np.testing.assert_array_equal(final_state, inputs["initial_state"])


def test_fast_decay_underflows_to_zero(scan):
    """exp(delta A) far below the smallest float32 forgets the state and gives no NaN."""
    inputs = device(make_inputs(*LONG))
    inputs["A"] = jnp.full_like(inputs["A"], -1e6)
    (y, _), gradients = with_gradients(scan, inputs, {}, make_weights(*LONG))
    assert np.isfinite(y).all()
    assert not np.any(gradients["initial_state"])
    assert all(np.isfinite(g).all() for g in gradients.values())


@pytest.mark.parametrize("without", [(), OPTIONAL[:2]])
def test_steps_equal_the_scan(without):
    inputs = make_inputs(*SMALL, without)
    expected_y, expected_state = oracle(**float64(inputs))
    state, step = jnp.asarray(inputs.pop("initial_state")), jax.jit(ssd_step)
    for t in range(SMALL[1]):
        now = {k: v[:, t] if k in SEQUENCES else v for k, v in device(inputs).items()}
        y, state = step(**now, state=state)
        assert_close(y, expected_y[:, t])
    assert_close(state, expected_state)


def test_one_position_is_a_step():
    """Chosen by itself, with no loop around it."""
    inputs = device(make_inputs(3, 1, 4, 2, 3, 5)) | {
        "segment_ids": jnp.asarray([[0], [1], [1]]),
        "lengths": jnp.asarray([1, 0, 0]),
    }
    actual, expected = (jax.jit(scan)(**inputs) for scan in (ssd, scan_of("reference")))
    assert_all_close(actual, expected)
    assert "while" not in jax.jit(ssd).lower(**inputs).as_text()


# 8 shards of 5 positions; the heads of two groups over two devices, or of one.
@pytest.mark.parametrize(
    ("mesh", "groups"),
    slow_but([("sequence", 2), ("mixed", 2), ("mixed", 1)], ("mixed", 1)),
)
@one_by_default
def test_sharded(scan, mesh, groups):
    """Every device's shard, with documents that start in some shards and lengths that end."""
    sizes = (4, 40, 4, groups, 3, 5)
    axes = {"sequence": 8} if mesh == "sequence" else {"data": 2, "sequence": 2, "tensor": 2}
    inputs, weights = make_inputs(*sizes), make_weights(*sizes)
    inputs["A"] *= np.float32(0.1)  # so slow that the first shard still matters to the last
    starts = np.zeros(sizes[:2], int)
    starts[0, [10, 11, 29]] = 1
    starts[3, [3, 20, 26, 33]] = 1
    marks = {"segment_ids": starts.cumsum(1), "lengths": np.array([40, 40, 1, 30])}
    gradients = gradients_in_float64(inputs, weights, **marks)
    mesh = make_mesh(jax.devices("cpu")[:8], ParallelConfig(fsdp=1, **axes))
    with jax.set_mesh(mesh):
        assert_conforms(scan, inputs, weights, gradients, **marks)
        heads = NamedSharding(mesh, jax.P(None, None, "tensor"))
        placed = device(inputs) | {"x": jax.device_put(inputs["x"], heads)}
        _, state = forward(scan, placed)
    assert state.sharding.shard_shape(state.shape)[1] == 4 // mesh.shape["tensor"]


@pytest.mark.parametrize(("platform", "expected"), [("cpu", "chunked"), ("tpu", "pallas_tpu")])
def test_choice_by_what_is_compiled_for(monkeypatch, platform, expected):
    chosen = []
    for name, scan in IMPLEMENTATIONS.items():

        def record(*args, name=name, scan=scan, **inputs):
            chosen.append(name)
            return scan(*args, **inputs)

        monkeypatch.setitem(IMPLEMENTATIONS, name, record)
    kind = AbstractDevice(device_kind="any", num_cores=None, platform=platform)
    mesh = AbstractMesh((1,), ("data",), (AxisType.Auto,), abstract_device=kind)
    inputs = device(make_inputs(*SMALL))
    with jax.sharding.use_abstract_mesh(mesh):
        jax.eval_shape(lambda v: ssd(**v), inputs)
    assert chosen == [expected]


@pytest.mark.skipif(target_platform() != "cpu", reason="says so of CPUs")
@pytest.mark.parametrize("kernel", sorted(INTERPRETER))
def test_a_kernel_fails_loudly_where_it_cannot_run(kernel):
    with pytest.raises(ValueError, match="Only interpret mode is supported on CPU backend"):
        ssd(**device(make_inputs(*SMALL)), implementation=kernel)


def test_refusals():
    inputs = device(make_inputs(*SMALL))
    with pytest.raises(ValueError, match=r"unknown ssd implementation 'cuda'; .*'chunked'"):
        ssd(**inputs, implementation="cuda")
    with pytest.raises(ValueError, match="4 heads are not a multiple of 3 groups"):
        ssd(**inputs | {"B": jnp.ones((2, 11, 3, 5)), "C": jnp.ones((2, 11, 3, 5))})
