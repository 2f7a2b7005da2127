"""The selective scan with its length sharded over devices, against the unsharded recurrence."""

import itertools
import math
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from test_selective_scan import (
    OPTIONAL,
    SEQUENCES,
    assert_conforms,
    assert_documents_apart,
    device,
    forward,
    gradients_in_float64,
    make_inputs,
    make_weights,
    on_device,
    scan_of,
    with_gradients,
)

from hymba_jax.config.parallel import ParallelConfig
from hymba_jax.parallel.mesh import make_mesh

# 8 shards of 5 positions, or 4 of 10.
MESHES = {"sequence": {"sequence": 8}, "batch and sequence": {"data": 2, "sequence": 4}}
SIZES = (4, 40, 3, 2)
COLLECTIVES = r" = (.*) (?:all-gather|all-reduce|all-to-all|reduce-scatter|collective-\w+)\S*\("


QUICK = [("sequence", "associative"), ("batch and sequence", "xla")]
CASES = [
    pytest.param(case, id="-".join(case), marks=[pytest.mark.slow] * (case not in QUICK))
    for case in itertools.product(MESHES, ["associative", "xla"])
]


@pytest.fixture(params=CASES)
def case(request):
    return request.param


@pytest.fixture
def mesh(case):
    return make_mesh(jax.devices("cpu")[:8], ParallelConfig(fsdp=1, **MESHES[case[0]]))


def make_slow_inputs(without=()):
    """With decay so slow that the first part still matters to the last."""
    inputs = make_inputs(*SIZES, without)
    return inputs | {"A": inputs["A"] * np.float32(0.03)}


def specs_of(names):
    """How the inputs lie on the mesh."""
    specs = dict.fromkeys((*SEQUENCES, "segment_ids"), P("data", "sequence"))
    specs |= dict.fromkeys(("initial_state", "lengths"), P("data"))
    return {name: specs.get(name, P()) for name in names}


@pytest.fixture
def scan(case):
    return scan_of(case[1])


@pytest.mark.parametrize("without", [(), OPTIONAL])
def test_state_passes_through_every_shard(mesh, scan, without):
    inputs, weights = make_slow_inputs(without), make_weights(*SIZES)
    weights[0][:, :-5] = 0
    gradients = gradients_in_float64(inputs, weights)
    first, largest = (np.abs(gradients["x"][:, part]).max() for part in (slice(5), slice(None)))
    assert first > 0.05 * largest
    with jax.set_mesh(mesh):
        assert_conforms(scan, inputs, weights, gradients)


def test_documents_and_lengths(mesh, scan):
    inputs, weights = make_slow_inputs(), make_weights(*SIZES)
    starts = np.zeros(SIZES[:2], int)
    # Where shards begin and end and within them, also past a row's end.
    starts[0, [10, 11, 29]] = 1
    starts[1, [15, 17, 39]] = 1
    starts[3, [3, 20, 26, 33]] = 1
    # To the end, to the end of a shard, into a middle one, nothing.
    for lengths in ([40, 20, 17, 23], [40, 0, 1, 30]):
        marks = {"segment_ids": starts.cumsum(1), "lengths": np.array(lengths)}
        gradients = gradients_in_float64(inputs, weights, **marks)
        with jax.set_mesh(mesh):
            assert_conforms(scan, inputs, weights, gradients, **marks)


def test_what_follows_the_end_does_not_matter(mesh, scan):
    """Not even when it is not a number."""
    inputs, weights, lengths = make_slow_inputs(), make_weights(*SIZES), [17, 40, 20, 3]
    marks = {"segment_ids": np.zeros(SIZES[:2], int), "lengths": np.array(lengths)}
    spoilt = {k: v.copy() for k, v in inputs.items()}
    for name in SEQUENCES:
        for row, end in enumerate(lengths):
            spoilt[name][row, end:] = np.nan
    with jax.set_mesh(mesh):
        clean, other = (
            with_gradients(scan, device(v), on_device(marks), weights) for v in (inputs, spoilt)
        )
    jax.tree.map(np.testing.assert_array_equal, other, clean)


def test_documents_do_not_see_each_other(mesh, scan):
    """One is a single position at the end of a shard, one begins a shard and one ends within it."""
    starts = np.zeros((1, SIZES[1]), int)
    starts[0, [14, 19, 20, 28]] = 1
    segment_ids = np.repeat(starts.cumsum(1), SIZES[0], axis=0)
    with jax.set_mesh(mesh):
        assert_documents_apart(scan, make_slow_inputs(), make_weights(*SIZES), segment_ids)


def test_every_device_has_the_last_state(mesh, scan):
    with jax.set_mesh(mesh):
        _, state = forward(scan, device(make_slow_inputs()))
    assert len(state.addressable_shards) == 8
    for shard in state.addressable_shards:
        np.testing.assert_array_equal(shard.data, state[shard.index])


def entries_sent(function, mesh, *arguments):
    """Sizes of the arrays that the compiled function's collectives give."""
    specs = [specs_of(argument) for argument in arguments]
    shardings = jax.tree.map(partial(NamedSharding, mesh), specs)
    arguments = jax.eval_shape(lambda *arguments: arguments, *arguments)
    with jax.set_mesh(mesh):
        compiled = jax.jit(function, in_shardings=tuple(shardings)).lower(*arguments).compile()
    given = "".join(re.findall(COLLECTIVES, compiled.as_text()))
    shapes = re.findall(r"\w\[([\d,]*)\]", given)
    return [math.prod(int(size) for size in shape.split(",") if size) for shape in shapes]


def test_only_states_are_sent(mesh, scan):
    batch, length, channels, state = sizes = (2, 512, 3, 2)
    inputs = device(make_inputs(*sizes))
    marks = {
        "segment_ids": jnp.zeros((batch, length), int),
        "lengths": jnp.full(batch, length),
    }
    gathered = mesh.shape["sequence"] * batch * state * channels
    # Fewer than the marks in a part, the smallest of what is as long as the sequence.
    assert gathered < batch * length // mesh.size

    def outputs(inputs, marks):
        return scan(**inputs, **marks)

    def loss(inputs, marks):
        return sum((out**2).sum() for out in outputs(inputs, marks))

    for function in (outputs, jax.grad(loss)):
        assert 0 < max(entries_sent(function, mesh, inputs, marks)) <= gathered


def test_a_length_that_the_mesh_does_not_divide(mesh, scan):
    sizes = (4, 41, 3, 2)
    inputs, weights = make_inputs(*sizes), make_weights(*sizes)
    gradients = gradients_in_float64(inputs, weights)
    with jax.set_mesh(mesh):
        assert_conforms(scan, inputs, weights, gradients)
