"""Attention with its length sharded over devices, against all of it on one."""

import re
from collections import Counter
from functools import partial
from unittest.mock import patch

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from slow import slow_but
from test_attention import (
    HEAD_DIM,
    VALUE_DIM,
    assert_close,
    assert_documents_apart,
    attend,
    by_hand,
    cast,
    inputs,
    with_gradients,
)

from hymba_jax.config.parallel import ParallelConfig
from hymba_jax.ops.attention.pallas_tpu import pallas_tpu
from hymba_jax.ops.attention.reference import reference
from hymba_jax.parallel.mesh import make_mesh

# 8 shards of 5 positions, 2 of 20, and 4 of 10 on devices that have whole groups of heads.
LENGTH = 40
MESHES = {
    "8": ParallelConfig(fsdp=1, sequence=8),
    "2": ParallelConfig(fsdp=4, sequence=2),
    "4 x tensor 2": ParallelConfig(fsdp=1, sequence=4, tensor=2),
}
# Windows of less than a shard, of whole shards, of some, of all; more meta tokens than a shard.
MASKS = [(None, 3), (None, 0), (3, 3), (5, 0), (10, 5), (13, 3), (39, 2), (100, 7)]
QUICK = [("8", None, 3), ("8", 5, 0), ("4 x tensor 2", 13, 3)]
defined = partial(attend, function=reference)
CASES = [("8", *mask) for mask in MASKS]
CASES += [(name, window, 3) for name in ("2", "4 x tensor 2") for window in (None, 13)]


def mesh_of(name):
    return make_mesh(jax.devices("cpu")[:8], MESHES[name])


@pytest.mark.parametrize(("mesh", "window", "meta"), slow_but(CASES, *QUICK))
def test_values_and_gradients(mesh, window, meta):
    arrays = inputs(LENGTH, meta=meta, batch=4)
    _, *expected = with_gradients(defined, *cast(arrays), window=window)
    with jax.set_mesh(mesh_of(mesh)):
        actual = with_gradients(attend, *cast(arrays), window=window)
    assert_close(actual, [by_hand(*arrays[:5], window), *expected])


@pytest.mark.slow  # as in `test_documents`, without these
def test_rows_that_begin_later():
    arrays, kwargs = inputs(LENGTH, batch=4), {"window": 13}
    kwargs["kv_start"] = jnp.array([0, 4, 11, 38])
    _, *expected = with_gradients(defined, *cast(arrays), **kwargs)
    with jax.set_mesh(mesh_of("8")):
        actual = with_gradients(attend, *cast(arrays), **kwargs)
    assert_close(actual, [by_hand(*arrays[:5], 13, kwargs["kv_start"]), *expected])


@pytest.mark.parametrize(
    ("mesh", "window"),
    slow_but([("8", None), ("8", 13), ("4 x tensor 2", 13)], ("8", 13)),
)
def test_documents(mesh, window):
    """Across shards, which some begin and some end with, and after the start of some rows."""
    arrays, starts = inputs(LENGTH, batch=4), np.zeros((4, LENGTH), int)
    for row, of_row in enumerate([[3, 10, 11, 24], [9, 20], [35, 38, 39], []]):
        starts[row, of_row] = 1
    segment_ids, kv_start = starts.cumsum(1), [0, 4, 11, 38]
    kwargs = {"window": window, "kv_start": jnp.array(kv_start)}
    kwargs["segment_ids"] = jnp.asarray(segment_ids)
    _, *expected = with_gradients(defined, *cast(arrays), **kwargs)
    with jax.set_mesh(mesh_of(mesh)):
        actual = with_gradients(attend, *cast(arrays), **kwargs)
    assert_close(actual, [by_hand(*arrays[:5], window, kv_start, segment_ids), *expected])


def test_documents_do_not_see_each_other():
    *arrays, cotangent = inputs(LENGTH)
    starts, segment_ids = [0, 3, 10, 14, 15, 31], np.zeros((2, LENGTH), int)
    segment_ids[:, starts] = 1
    kwargs = {"window": 13, "segment_ids": jnp.asarray(segment_ids.cumsum(1))}
    with jax.set_mesh(mesh_of("8")):
        assert_documents_apart(attend, arrays, cotangent, starts, **kwargs)


@pytest.mark.parametrize("window", slow_but([None, 13], 13))
def test_bfloat16(window):
    """Weights, values and gradients are rounded to 8 bits, and what several shards add to the
    gradient of a key once more each: some times 2**-8."""
    arrays = cast(inputs(LENGTH), jnp.bfloat16)
    with jax.set_mesh(mesh_of("8")):
        actual = with_gradients(attend, *arrays, window=window)
    expected = with_gradients(defined, *(a.astype(jnp.float32) for a in arrays), window=window)
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == jnp.bfloat16
        atol = 6 * 2**-8 * max(1, np.abs(b).max())
        np.testing.assert_allclose(a.astype(jnp.float32), b, rtol=0, atol=atol)


@pytest.mark.parametrize(("window", "positions"), [(None, 35), (13, 13), (3, 3)])
def test_no_more_keys_are_sent_than_are_seen(window, positions):
    """To each device, 5 at a time; it has the meta tokens."""
    mesh = mesh_of("8")
    sharded, whole = (jax.NamedSharding(mesh, jax.P(*axes)) for axes in [(None, "sequence"), ()])
    shardings = (*[sharded] * 3, *[whole] * 2)
    function = partial(attend, window=window)
    jitted = jax.jit(function, in_shardings=shardings, out_shardings=sharded)
    arrays = cast(inputs(LENGTH)[:5])
    with jax.set_mesh(mesh):
        text = jitted.lower(*arrays).compile().as_text()
    sent = Counter()
    kinds = r"all-\w+|reduce-\w+|collective-permute"
    for types, kind in re.findall(rf" = (.*?) ({kinds})(?:-start)?\(", text):
        for length, width in re.findall(r"\[\d+,(\d+),\d+,(\d+)\]", types):
            sent[kind, int(width)] += int(length)
    assert sent == {("collective-permute", width): positions for width in (HEAD_DIM, VALUE_DIM)}


def test_a_length_that_the_mesh_does_not_divide_is_replicated():
    arrays = cast(inputs(LENGTH + 1))
    expected = with_gradients(attend, *arrays, window=7)
    with jax.set_mesh(mesh_of("8")):
        actual = with_gradients(attend, *arrays, window=7)
        text = jax.jit(partial(attend, window=7)).lower(*arrays[:5]).compile().as_text()
    assert "collective-permute" not in text
    assert_close(actual, expected)


@pytest.mark.parametrize("window", slow_but([None, 150], 150))
def test_pallas_tpu(window):
    """In Pallas's interpret mode, with blocks of which a shard has some."""
    rng = np.random.default_rng(0)
    rows = [(1, 512, 4, 8), (1, 512, 2, 8), (1, 512, 2, 16)]
    shapes = [*rows, (5, 2, 8), (5, 2, 16), (1, 512, 4, 16)]
    arrays = [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]
    expected = with_gradients(defined, *arrays, window=window)
    interpreted = partial(pl.pallas_call, interpret=True)
    with (
        jax.set_mesh(make_mesh(jax.devices("cpu")[:4], ParallelConfig(fsdp=1, sequence=4))),
        patch("hymba_jax.ops.attention.pallas_tpu._BLOCK", 128),
        patch.object(pl, "pallas_call", interpreted),
        jax.default_matmul_precision("highest"),
    ):
        actual = with_gradients(partial(attend, function=pallas_tpu), *arrays, window=window)
    assert_close(actual, expected)
