"""Ops on a mesh that splits rows and widths, against what they are on whole arrays."""

import itertools
import re
from contextlib import nullcontext
from functools import partial
from unittest.mock import patch

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from slow import slow_but
from test_attention import assert_close, attend, by_hand, cast, with_gradients
from test_selective_scan import (
    INTERPRETER,
    assert_conforms,
    gradients_in_float64,
    make_inputs,
    make_marks,
    make_weights,
)

from hymba_jax.config.parallel import ParallelConfig
from hymba_jax.ops.attention.cudnn import cudnn
from hymba_jax.ops.attention.reference import reference
from hymba_jax.ops.selective_scan import selective_scan
from hymba_jax.parallel.mesh import make_mesh
from hymba_jax.parallel.shard_map import shard_map

COLLECTIVES = r"all-gather|all-reduce|all-to-all|reduce-scatter|collective-permute"


@pytest.fixture
def mesh():
    return make_mesh(jax.devices("cpu")[:8], ParallelConfig(data=2, fsdp=2, tensor=2))


@pytest.mark.parametrize(
    ("implementation", "batch"),
    slow_but(itertools.product(["xla", "pallas_tpu"], [4, 3]), ("xla", 3), ("pallas_tpu", 4)),
)
def test_scan(mesh, implementation, batch):
    """Of rows that the mesh splits and of rows that it does not."""
    sizes = (batch, 12, 6, 2)
    inputs, weights, marks = make_inputs(*sizes), make_weights(*sizes), make_marks(*sizes[:2])
    gradients = gradients_in_float64(inputs, weights, **marks)
    scan = partial(selective_scan, implementation=implementation)
    with jax.set_mesh(mesh), INTERPRETER.get(implementation, nullcontext)():
        assert_conforms(scan, inputs, weights, gradients, **marks)


@pytest.mark.parametrize("kv_heads", [2, 3])
def test_attention(mesh, kv_heads):
    """Of whole groups of heads, also where the mesh could divide the query heads alone."""
    rng = np.random.default_rng(kv_heads)
    rows = [(4, 9, 6, 4), (4, 11, kv_heads, 4), (4, 11, kv_heads, 8)]
    shapes = [*rows, (2, kv_heads, 4), (2, kv_heads, 8), (4, 9, 6, 8)]
    arrays = [rng.normal(size=shape) for shape in shapes]
    kwargs = {"window": 4, "kv_start": jnp.array([0, 1, 2, 3])}
    defined = partial(attend, function=reference)
    _, *expected = with_gradients(defined, *cast(arrays), **kwargs)
    with jax.set_mesh(mesh):
        actual = with_gradients(attend, *cast(arrays), **kwargs)
    assert_close(actual, [by_hand(*arrays[:5], **kwargs), *expected])


def test_cudnn_is_asked_for_whole_groups_of_heads(mesh):
    """As where it is installed, which this machine need not have."""
    check = "jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version"
    shapes = [(4, 14, 6, 8), (4, 14, 2, 8), (4, 14, 2, 8), (2, 2, 8), (2, 2, 8)]
    arrays = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
    run = partial(attend, window=None, function=cudnn)
    with jax.set_mesh(mesh), patch(check, return_value=91000):
        lowered = jax.jit(run).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()
    (types,) = re.findall(r"custom_call @__cudnn\$fmha.* : \((.*)\) ->", lowered)
    assert types.split(", ")[:2] == ["tensor<1x16x3x8xbf16>", "tensor<1x16x1x8xbf16>"]


@pytest.mark.parametrize(("width", "collectives"), [(6, ["all-reduce"]), (5, [])])
def test_only_partial_results_are_summed(mesh, width, collectives):
    """The gradient of what all widths share, and only where they are split."""
    rows = jax.NamedSharding(mesh, jax.P(("data", "fsdp")))
    whole = jax.NamedSharding(mesh, jax.P(("data", "fsdp"), "tensor" if width == 6 else None))
    axes = {"x": ("batch", "channels"), "factor": ("batch", None)}

    def gradients(x, factor, dy):
        scale = partial(shard_map, lambda x, factor: x * factor, axes, axes["x"])
        return jax.vjp(lambda x, factor: scale(x=x, factor=factor), x, factor)[1](dy)

    rng = np.random.default_rng(0)
    x, dy = rng.normal(size=(2, 4, width)).astype(np.float32)
    factor = rng.normal(size=(4, 1)).astype(np.float32)
    arrays = jax.device_put((x, factor, dy), (whole, rows, whole))
    with jax.set_mesh(mesh):
        jitted = jax.jit(gradients, out_shardings=(whole, rows))
        compiled = jitted.lower(*arrays).compile()
    assert re.findall(rf" ({COLLECTIVES})(?:-start)?\(", compiled.as_text()) == collectives
    dx, dfactor = compiled(*arrays)
    np.testing.assert_allclose(dx, dy * factor, rtol=1e-6)
    np.testing.assert_allclose(dfactor, (x * dy).sum(1, keepdims=True), rtol=1e-5)
