"""The causal convolution with its length sharded over devices, against its formula."""

import itertools
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from slow import slow_but
from test_causal_conv import (
    assert_close,
    assert_documents_apart,
    device,
    loss_of,
    make_inputs,
    make_weights,
    oracle,
)

from hymba_jax.config.parallel import ParallelConfig
from hymba_jax.ops.causal_conv import causal_conv
from hymba_jax.parallel.mesh import make_mesh

# 8 shards of 3 positions, or 4 of 6 on devices that have half of the channels.
LENGTH = 24
MESHES = {
    "8": ParallelConfig(fsdp=1, sequence=8),
    "4 x tensor 2": ParallelConfig(fsdp=1, sequence=4, tensor=2),
}


@pytest.fixture(params=MESHES)
def mesh(request):
    return mesh_of(request.param)


def mesh_of(name):
    return make_mesh(jax.devices("cpu")[:8], MESHES[name])


def make_documents():
    """They start where shards begin and end and within them."""
    starts = np.zeros((2, LENGTH), int)
    starts[0, [6, 7, 11]] = 1
    starts[1, [12, 17, 23]] = 1
    return starts.cumsum(1)


@pytest.mark.parametrize(
    ("name", "kernel", "documents"),
    slow_but(
        itertools.product(MESHES, (1, 2, 4), (False, True)),
        ("8", 1, True),
        ("8", 2, False),
        ("8", 4, True),
        ("4 x tensor 2", 2, True),
        ("4 x tensor 2", 4, False),
    ),
)
def test_values_and_gradients(name, kernel, documents):
    mesh = mesh_of(name)
    inputs = make_inputs(LENGTH, kernel, channels=6)
    marks = {"segment_ids": make_documents()} if documents else {}
    weights = make_weights(inputs)
    conv = partial(causal_conv, **{name: jnp.asarray(mark) for name, mark in marks.items()})
    gradient = jax.grad(loss_of(conv, weights))
    expected = jax.jit(gradient)(device(inputs))
    with jax.set_mesh(mesh):
        y, final_inputs = jax.jit(conv)(**device(inputs))
        actual = jax.jit(gradient)(device(inputs))
    expected_y, expected_inputs = oracle(**inputs, **marks)
    assert_close(y, expected_y)
    np.testing.assert_array_equal(final_inputs, expected_inputs)
    for name, wanted in expected.items():
        if wanted.size:
            assert_close(actual[name], np.asarray(wanted))


def test_without_inputs_before(mesh):
    inputs = make_inputs(LENGTH, 4, channels=6)
    inputs["initial_inputs"] = np.zeros_like(inputs["initial_inputs"])
    expected, _ = oracle(**inputs)
    del inputs["initial_inputs"]
    with jax.set_mesh(mesh):
        y, _ = jax.jit(causal_conv)(**device(inputs))
    assert_close(y, expected)


def test_documents_do_not_see_each_other(mesh):
    """One of a single position at the end of a shard; one that is the end of a shard and the next
    position; one that ends with a shard."""
    with jax.set_mesh(mesh):
        assert_documents_apart(
            causal_conv, make_inputs(LENGTH, 4, channels=6), [0, 5, 6, 11, 13, 18]
        )


def test_only_the_inputs_before_a_shard_are_sent():
    inputs = device(make_inputs(LENGTH, 4, channels=6))
    mesh = make_mesh(jax.devices("cpu")[:8], MESHES["8"])
    split = jax.NamedSharding(mesh, jax.P(None, "sequence"))
    place = {"x": split} | dict.fromkeys(("weight", "bias", "initial_inputs"), jax.P())

    def outputs(inputs):
        return causal_conv(**inputs)[0]

    with jax.set_mesh(mesh):
        jitted = jax.jit(outputs, in_shardings=(place,), out_shardings=split)
        text = jitted.lower(inputs).compile().as_text()
    assert re.findall(r" = (\S+?)\{\S* (?:all|reduce|collective)-\w+\(", text) == ["f32[2,3,6]"]


@pytest.mark.parametrize(("length", "lengths"), [(LENGTH, [24, 7]), (25, None), (16, None)])
def test_indivisible_lengths_are_replicated(length, lengths):
    """Rows that end early, a length that the mesh does not divide, parts shorter than the kernel
    looks back."""
    inputs = make_inputs(length, 4)
    marks = {} if lengths is None else {"lengths": np.array(lengths)}
    with jax.set_mesh(make_mesh(jax.devices("cpu")[:8], MESHES["8"])):
        y, final_inputs = jax.jit(causal_conv)(**device(inputs | marks))
    expected_y, expected_inputs = oracle(**inputs, **marks)
    assert_close(y, expected_y)
    np.testing.assert_array_equal(final_inputs, expected_inputs)
