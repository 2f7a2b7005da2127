"""The selective scan with its length split over devices, against the recurrence over the whole."""

import math
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from test_selective_scan import (
    OPTIONAL,
    assert_conforms,
    device,
    gradients_in_float64,
    loss_of,
    make_inputs,
    make_weights,
)

from hymba_jax.ops.selective_scan import selective_scan

# 8 parts of 5 positions, or 4 of 10.
MESHES = {"sequence": {"sequence": 8}, "batch and sequence": {"batch": 2, "sequence": 4}}
SIZES = (4, 40, 3, 2)
SEQUENCES = ("x", "dt", "B", "C", "z")
COLLECTIVES = r" = (.*) (?:all-gather|all-reduce|all-to-all|reduce-scatter|collective-\w+)\S*\("


@pytest.fixture(params=MESHES)
def mesh(request):
    sizes = MESHES[request.param]
    return jax.make_mesh(
        tuple(sizes.values()),
        tuple(sizes),
        (AxisType.Auto,) * len(sizes),
        devices=jax.devices("cpu"),
    )


@pytest.fixture(params=["associative", "xla"])
def implementation(request):
    return request.param


def make_slow_inputs(without=()):
    """With decay so slow that the first part still matters to the last."""
    inputs = make_inputs(*SIZES, without)
    return inputs | {"A": inputs["A"] * np.float32(0.03)}


def specs_of(mesh, names):
    """How the inputs lie on the mesh."""
    rows = "batch" if "batch" in mesh.axis_names else None
    specs = dict.fromkeys((*SEQUENCES, "resets"), P(rows, "sequence"))
    specs |= dict.fromkeys(("initial_state", "lengths"), P(rows))
    return {name: specs.get(name, P()) for name in names}


def sharded(mesh, implementation):
    """`selective_scan` of whole arrays, computed in parts."""

    def scan(**inputs):
        specs = specs_of(mesh, ("x", "initial_state", *inputs))
        in_parts = jax.shard_map(
            lambda v: selective_scan(**v, axis_name="sequence", implementation=implementation),
            mesh=mesh,
            in_specs=({name: specs[name] for name in inputs},),
            out_specs=(specs["x"], specs["initial_state"]),
            check_vma=False,
        )
        return in_parts(inputs)

    return scan


@pytest.mark.parametrize("without", [(), OPTIONAL])
def test_state_passes_through_every_part(mesh, implementation, without):
    inputs, weights = make_slow_inputs(without), make_weights(*SIZES)
    weights[0][:, :-5] = 0
    gradients = gradients_in_float64(inputs, weights)
    first, largest = (np.abs(gradients["x"][:, part]).max() for part in (slice(5), slice(None)))
    assert first > 0.05 * largest
    assert_conforms(sharded(mesh, implementation), inputs, weights, gradients)


def test_resets_and_lengths(mesh, implementation):
    inputs, weights = make_slow_inputs(), make_weights(*SIZES)
    resets = np.zeros(SIZES[:2], bool)
    # Where parts begin and end and within them, also past a row's end.
    resets[0, [10, 11, 29]] = True
    resets[1, [0, 15, 17, 39]] = True
    resets[3, [3, 20, 26, 33]] = True
    # To the end, to the end of a part, into a middle one, nothing.
    for lengths in ([40, 20, 17, 23], [40, 0, 1, 30]):
        marks = {"resets": resets, "lengths": np.array(lengths)}
        gradients = gradients_in_float64(inputs, weights, **marks)
        assert_conforms(sharded(mesh, implementation), inputs, weights, gradients, **marks)


def test_what_follows_the_end_does_not_matter(mesh, implementation):
    """Not even when it is not a number."""
    inputs, weights, lengths = make_slow_inputs(), make_weights(*SIZES), [17, 40, 20, 3]
    spoilt = {k: v.copy() for k, v in inputs.items()}
    for name in SEQUENCES:
        for row, end in enumerate(lengths):
            spoilt[name][row, end:] = np.nan
    scan = partial(sharded(mesh, implementation), lengths=jnp.array(lengths))
    for function in (lambda v: scan(**v), jax.grad(loss_of(scan, weights))):
        clean = jax.jit(function)(device(inputs))
        jax.tree.map(np.testing.assert_array_equal, jax.jit(function)(device(spoilt)), clean)


def test_a_document_does_not_see_the_one_before(mesh, implementation):
    """Changing what comes before a reset in a middle part changes nothing from there on."""
    inputs, changed, first = make_slow_inputs(), make_slow_inputs(), 17
    for name in SEQUENCES:
        changed[name][:, :first] *= -2
    resets = jnp.zeros(SIZES[:2], bool).at[:, first].set(True)
    weights = make_weights(*SIZES)
    weights[0][:, :first] = 0
    scan = partial(sharded(mesh, implementation), resets=resets)

    def of_the_second(inputs):
        y, state = jax.jit(scan)(**inputs)
        gradients = jax.jit(jax.grad(loss_of(scan, weights)))(inputs)
        assert not gradients["initial_state"].any()
        assert not any(gradients[name][:, :first].any() for name in SEQUENCES)
        return y[:, first:], state, [gradients[name][:, first:] for name in SEQUENCES]

    of_one, of_other = (of_the_second(device(v)) for v in (inputs, changed))
    jax.tree.map(np.testing.assert_array_equal, of_one, of_other)


def test_every_device_has_the_last_state(mesh, implementation):
    scan = sharded(mesh, implementation)
    _, state = jax.jit(scan)(**device(make_slow_inputs()))
    assert len(state.addressable_shards) == 8
    for shard in state.addressable_shards:
        np.testing.assert_array_equal(shard.data, state[shard.index])


def entries_sent(function, mesh, *arguments):
    """Sizes of the arrays that the compiled function's collectives give."""
    specs = [specs_of(mesh, argument) for argument in arguments]
    shardings = jax.tree.map(partial(NamedSharding, mesh), specs)
    compiled = jax.jit(function, in_shardings=tuple(shardings)).lower(*arguments).compile()
    given = "".join(re.findall(COLLECTIVES, compiled.as_text()))
    shapes = re.findall(r"\w\[([\d,]*)\]", given)
    return [math.prod(int(size) for size in shape.split(",") if size) for shape in shapes]


def test_only_states_are_sent(mesh, implementation):
    batch, length, channels, state = sizes = (2, 512, 3, 2)
    inputs = device(make_inputs(*sizes))
    marks = {"resets": jnp.zeros((batch, length), bool), "lengths": jnp.full(batch, length)}
    gathered = mesh.shape["sequence"] * batch * state * channels
    # Fewer than the marks in a part, the smallest of what is as long as the sequence.
    assert gathered < batch * length // mesh.size

    def scan(inputs, marks):
        return sharded(mesh, implementation)(**inputs, **marks)

    def loss(inputs, marks):
        return sum((out**2).sum() for out in scan(inputs, marks))

    for function in (scan, jax.grad(loss)):
        assert 0 < max(entries_sent(function, mesh, inputs, marks)) <= gathered

    def whole(inputs, marks):
        return selective_scan(**inputs, **marks, implementation=implementation)

    # Unsplit, the scan needs everything everywhere, and the compiler sends it.
    assert max(entries_sent(whole, mesh, inputs, marks)) >= batch * length
