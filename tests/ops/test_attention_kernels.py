"""Attention by kernels, as far as they run on a CPU, against `reference`.

The kernels for TPUs run in Pallas's interpret mode. cuDNN does not run: XLA's attention stands in
for it, which takes the same arguments, so what is tested is that they are the right ones.
"""

from functools import partial
from types import SimpleNamespace
from unittest.mock import patch

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from slow import slow_but
from test_attention import assert_documents_apart, attend_by

from hymba_jax.ops.attention import api
from hymba_jax.ops.attention.cudnn import cudnn
from hymba_jax.ops.attention.pallas_tpu import pallas_tpu
from hymba_jax.ops.attention.reference import reference

HEADS, KV_HEADS, HEAD_DIM, VALUE_DIM = 4, 2, 8, 16
# Relative to the largest entry. Float32 rounds at 6e-8, sums have some hundred terms; bfloat16
# rounds at 4e-3, and so do weights, values and results.
TOLERANCE = {"float32": 3e-6, "bfloat16": 2e-2}
IMPLEMENTATIONS = pytest.mark.parametrize("implementation", [pallas_tpu, cudnn])


@pytest.fixture(autouse=True)
def stand_ins():
    """Also blocks of 128, for short sequences to have some."""
    interpreted = partial(pl.pallas_call, interpret=True)
    xla = jax.nn.dot_product_attention

    def stand_in(*arrays, implementation, **kwargs):
        assert implementation == "cudnn"
        return xla(*arrays, implementation="xla", **kwargs)

    with (
        patch("hymba_jax.ops.attention.pallas_tpu._BLOCK", 128),
        patch.object(pl, "pallas_call", interpreted),
        patch("jax.nn.dot_product_attention", stand_in),
        jax.default_matmul_precision("highest"),
    ):
        yield


def inputs(queries, keys, dtype="float32"):
    """Queries, keys and values with those of the meta tokens first, and a cotangent; two rows."""
    rng = np.random.default_rng(queries)
    shapes = [
        (queries, HEADS, HEAD_DIM),
        (keys, KV_HEADS, HEAD_DIM),
        (keys, KV_HEADS, VALUE_DIM),
        (queries, HEADS, VALUE_DIM),
    ]
    return [jnp.asarray(rng.normal(size=(2, *shape)), dtype) for shape in shapes]


def assert_same(implementation, arrays, **kwargs):
    """The output, and the gradients along the cotangent."""

    @partial(jax.jit, static_argnums=0)
    def run(attention, *arrays):
        *arrays, cotangent = arrays
        output, vjp = jax.vjp(partial(attention, **kwargs), *arrays)
        return output, *vjp(cotangent)

    expected = run(reference, *(a.astype(jnp.float32) for a in arrays))
    dtype = str(arrays[0].dtype)
    for actual, wanted in zip(run(implementation, *arrays), expected, strict=True):
        assert actual.dtype == dtype
        assert actual.shape == wanted.shape
        error = jnp.abs(actual.astype(jnp.float32) - wanted).max() / jnp.abs(wanted).max()
        assert error < TOLERANCE[dtype]


@IMPLEMENTATIONS
@pytest.mark.parametrize(
    ("window", "meta", "dtype"),
    slow_but(
        [
            (None, 5, "float32"),
            (37, 5, "bfloat16"),
            (37, 5, "float32"),
            (130, 0, "float32"),
            (296, 5, "float32"),
        ],
        (37, 5, "bfloat16"),
        (130, 0, "float32"),
    ),
)
def test_full_sequences(implementation, window, meta, dtype):
    """Windows of less than a block and of more, one of which loses a single key; a length that
    neither blocks nor windows divide."""
    arrays = inputs(303, 303 + meta, dtype)
    assert_same(implementation, arrays, window=window, num_meta_tokens=meta)


@pytest.mark.parametrize("implementation", slow_but([pallas_tpu, cudnn], cudnn))
def test_a_sequence_that_fits_into_the_window(implementation):
    assert_same(implementation, inputs(3, 5), window=4, num_meta_tokens=2)


@pytest.mark.parametrize("window", slow_but([None, 37], 37))
def test_fewer_queries_and_invalid_keys(window):
    kv_start = jnp.asarray([0, 220])  # before the first query, and after it
    kwargs = {"window": window, "num_meta_tokens": 5, "kv_start": kv_start}
    assert_same(pallas_tpu, inputs(150, 303), **kwargs)


@pytest.mark.parametrize(
    ("window", "meta", "dtype"),
    slow_but(
        [(None, 5, "float32"), (37, 5, "float32"), (130, 0, "float32"), (37, 5, "bfloat16")],
        (None, 5, "float32"),
    ),
)
def test_documents(window, meta, dtype):
    """Of one position, of whole blocks, and across blocks."""
    starts = np.zeros((2, 303), int)
    for row, of_row in enumerate(([4, 5, 128, 256], [150])):
        starts[row, of_row] = of_row
    kv_start = jnp.asarray(np.maximum.accumulate(starts, axis=1) + meta)
    arrays = inputs(303, 303 + meta, dtype)
    assert_same(pallas_tpu, arrays, window=window, num_meta_tokens=meta, kv_start=kv_start)


def test_documents_do_not_see_each_other():
    """Outputs and gradients of each are the same to the last bit, whatever the others hold."""
    *arrays, cotangent = (np.asarray(a[:1]) for a in inputs(303, 303))
    meta = [a[0, :5] for a in arrays[1:]]
    starts = [0, 4, 5, 200]
    ids = np.zeros((1, 303), int)
    ids[:, starts[1:]] = 1
    kwargs = {"window": 150, "segment_ids": jnp.asarray(ids.cumsum(1))}
    assert_documents_apart(attend_by(pallas_tpu), [*arrays, *meta], cotangent, starts, **kwargs)


def test_a_query_that_sees_nothing_gives_nothing():
    """Such are the positions before a sequence that is padded on the left."""
    *arrays, cotangent = inputs(140, 140)
    kv_start = jnp.asarray([7, 130])

    @jax.jit
    def run(arrays, cotangent):
        attention = partial(pallas_tpu, window=None, num_meta_tokens=0, kv_start=kv_start)
        output, vjp = jax.vjp(attention, *arrays)
        return output, *vjp(cotangent)

    for result in jax.device_get(run(arrays, cotangent)):
        assert np.isfinite(result).all()
        assert not result[0, :7].any()
        assert not result[1, :130].any()


@pytest.mark.parametrize(("queries", "kv_start"), [(3, None), (7, [0, 4])])
def test_cudnn_refuses_partial_sequences(queries, kv_start):
    *arrays, _ = inputs(queries, 9)
    kv_start = None if kv_start is None else jnp.asarray(kv_start)
    with pytest.raises(ValueError, match="needs as many queries as keys, all valid"):
        cudnn(*arrays, window=None, num_meta_tokens=2, kv_start=kv_start)


def test_cudnn_refuses_documents():
    *arrays, _ = inputs(9, 9)
    kwargs = {"window": 4, "segment_ids": jnp.zeros((2, 9), int)}
    message = (
        "attention 'cudnn' does not support segment_ids; these do: blocks, pallas_gpu, "
        "pallas_tpu, reference"
    )
    with pytest.raises(ValueError, match=message):
        api.attention(*arrays, **kwargs, implementation="cudnn")


@pytest.mark.parametrize(
    ("platform", "queries", "kv_start", "dtype", "chosen", "with_documents"),
    [
        ("cpu", 9, None, "bfloat16", "blocks", "blocks"),
        ("tpu", 9, None, "float32", "pallas_tpu", "pallas_tpu"),
        ("tpu", 3, [2, 4], "bfloat16", "pallas_tpu", "pallas_tpu"),
        ("gpu", 9, None, "bfloat16", "pallas_gpu", "pallas_gpu"),
        ("gpu", 3, [2, 4], "bfloat16", "pallas_gpu", "pallas_gpu"),
        ("gpu", 9, None, "float32", "blocks", "blocks"),
        ("older gpu", 9, None, "bfloat16", "cudnn", "blocks"),
        ("newer gpu", 9, None, "bfloat16", "cudnn", "blocks"),
        ("newer gpu", 3, None, "bfloat16", "blocks", "blocks"),
        ("newer gpu", 9, [2, 4], "bfloat16", "blocks", "blocks"),
    ],
)
def test_the_platform_chooses_what_can_do_it(
    monkeypatch, platform, queries, kv_start, dtype, chosen, with_documents
):
    monkeypatch.setattr(api, "target_platform", lambda: platform)
    monkeypatch.setattr(api, "fits_in_vmem", lambda *_: True)
    called = []

    def stand_in(name, *args, **kwargs):
        called.append(name)
        return reference(*args, **kwargs)

    stand_ins = {name: partial(stand_in, name) for name in api.IMPLEMENTATIONS}
    monkeypatch.setattr(api, "IMPLEMENTATIONS", stand_ins)
    *arrays, _ = inputs(queries, 9, dtype)
    kv_start = None if kv_start is None else jnp.asarray(kv_start)

    def run(query, key, value, **kwargs):
        meta = {"meta_key": key[0, :2], "meta_value": value[0, :2]}
        return api.attention(query, key, value, window=4, kv_start=kv_start, **meta, **kwargs)

    jax.eval_shape(run, *arrays)
    jax.eval_shape(run, *arrays, segment_ids=jnp.zeros((2, queries), int))
    assert called == [chosen, with_documents]


@pytest.mark.parametrize(("platform", "widest"), [("gpu", 256), ("older gpu", 128)])
def test_what_cudnn_refuses_is_computed_in_blocks(monkeypatch, platform, widest):
    """Of heads that are too wide for the kernels for Hopper."""
    monkeypatch.setattr(api, "target_platform", lambda: platform)

    def chosen(head_dim, value_dim, window, num_meta_tokens, dtype="bfloat16"):
        query = jnp.zeros((1, 40, 1, head_dim), dtype)
        key, value = (
            jnp.zeros((1, 40 + num_meta_tokens, 1, width), dtype) for width in (head_dim, value_dim)
        )
        return api.fastest(query, key, value, None, num_meta_tokens, window)

    for accepted in ((72, widest, 8, 4), (72, 72, None, 3), (72, 72, 8, 4, "float16")):
        assert chosen(*accepted) == "cudnn"
    for refused in (
        *((72, widest + 8, 8, 4), (72, 76, 8, 4), (80, 72, 8, 4), (72, 72, 8, 4, "float32")),
        *((72, 72, 7, 4), (72, 72, 8, 3)),
    ):
        assert chosen(*refused) == "blocks"


@pytest.mark.parametrize(
    ("mebibytes", "dtype", "head_dim", "value_dim", "most"),
    [
        # Of 7/8, 16 MiB are for what does not depend on the length. A key and its value take two
        # buffers each, also for gradients, the transposed key and two sums in float32:
        (128, "bfloat16", 64, 128, 96 * 2**20 // (8 * 192 + 6 * 128 + 4 * 128)),
        (128, "float32", 64, 128, 96 * 2**20 // (16 * 192 + 8 * 128 + 4 * 128)),
        # A v5p's, and heads that fill their lanes and sublanes as little as wider ones do.
        (64, "bfloat16", 64, 128, 40 * 2**20 // (8 * 192 + 6 * 128 + 4 * 128)),
        (128, "bfloat16", 8, 16, 96 * 2**20 // (8 * 144 + 6 * 128 + 4 * 128)),
    ],
)
def test_tpus_choose_blocks_for_keys_that_do_not_fit_into_vmem(
    monkeypatch, mebibytes, dtype, head_dim, value_dim, most
):
    monkeypatch.setattr(api, "target_platform", lambda: "tpu")
    info = SimpleNamespace(vmem_capacity_bytes=mebibytes * 2**20)
    monkeypatch.setattr(pltpu, "get_tpu_info", lambda: info)
    for keys, chosen in ((most, "pallas_tpu"), (most + 1, "blocks")):
        key, value = (jnp.zeros((1, keys, 1, n), dtype) for n in (head_dim, value_dim))
        assert api.fastest(key, key, value, None, num_meta_tokens=0, window=None) == chosen
