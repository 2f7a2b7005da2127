"""Attention's kernels for GPUs in Pallas's interpret mode, against `reference`, and their spans.

The interpreter has no matrix instructions that add to registers: XLA's matmuls stand in for them.
Everything else is interpreted: copies, barriers between two warpgroups, the mask, sums and writes.
"""

from functools import partial
from unittest.mock import patch

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from slow import slow_but
from test_attention import assert_documents_apart, attend, documents, inputs
from wgmma_in_float32 import multiply_add

from hymba_jax.ops.attention import gpu_kernels, pallas_gpu
from hymba_jax.ops.attention.gpu_tiles import Sizes, key_spans, query_spans
from hymba_jax.ops.attention.reference import attention_mask, reference

small = partial(Sizes, rows=8, keys=16, queries=8)
# Relative to the largest entry: bfloat16 rounds weights, values and results at 4e-3.
TOLERANCE = 1e-2


@pytest.fixture
def interpreted():
    """With blocks so small that short sequences have several."""

    with (
        plgpu.force_gpu_interpret_mode(),
        patch.object(pallas_gpu, "Sizes", small),
        patch.object(gpu_kernels, "multiply_add", multiply_add),
        jax.default_matmul_precision("highest"),
    ):
        yield


def arrays_of(queries, keys, heads, kv_heads, rows=2):
    rng = np.random.default_rng(keys)
    shapes = [(queries, heads, 8), (keys, kv_heads, 8), (keys, kv_heads, 16), (queries, heads, 16)]
    return [jnp.asarray(rng.normal(size=(rows, *shape)), jnp.bfloat16) for shape in shapes]


def with_gradients(attention, *arrays, **kwargs):
    @jax.jit
    def run(*arrays):
        *arrays, cotangent = arrays
        output, vjp = jax.vjp(partial(attention, **kwargs), *arrays)
        return output, *vjp(cotangent)

    return jax.device_get(run(*arrays))


def firsts(*starts, queries, keys):
    """The first key of each query's document, of which the first begins with the keys."""
    positions = np.arange(keys - queries, keys)
    return jnp.asarray(
        [np.where(positions[:, None] >= row, row, 0).max(1) for row in starts], jnp.int32
    )


CASES = {
    # A row of documents that begin in blocks and between them, one of a single query, and a row of
    # one document; keys before the first query.
    "documents": (
        (37, 60, 2, 1),
        {
            "window": 20,
            "num_meta_tokens": 18,
            "kv_start": firsts([32, 41, 42], [0], queries=37, keys=60),
        },
    ),
    "a whole sequence": ((33, 38, 1, 1), {"window": None, "num_meta_tokens": 5}),
    "global documents": (
        (61, 81, 4, 2),
        {
            "window": None,
            "num_meta_tokens": 20,
            "kv_start": firsts([40, 50], [0], queries=61, keys=81),
        },
    ),
    "a window in whole sequences": ((40, 45, 5, 1), {"window": 7, "num_meta_tokens": 5}),
    "after padding": (
        (21, 81, 4, 2),
        {"window": None, "num_meta_tokens": 0, "kv_start": jnp.array([30, 58])},
    ),
    "a query among meta tokens": ((3, 9, 2, 2), {"window": 2, "num_meta_tokens": 9}),
}


@pytest.mark.parametrize("name", slow_but(CASES, "documents", "a whole sequence"))
@pytest.mark.usefixtures("interpreted")
def test_values_and_gradients(name):
    sizes, kwargs = CASES[name]
    arrays = arrays_of(*sizes)
    actual = with_gradients(pallas_gpu.pallas_gpu, *arrays, **kwargs)
    expected = with_gradients(reference, *(a.astype(jnp.float32) for a in arrays), **kwargs)
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == jnp.bfloat16
        assert np.abs(a.astype(np.float32) - b).max() <= TOLERANCE * np.abs(b).max()


@pytest.mark.usefixtures("interpreted")
def test_a_query_that_sees_nothing_gives_nothing():
    arrays, kwargs = arrays_of(8, 8, 1, 1, rows=1), {"window": None, "num_meta_tokens": 0}
    kwargs["kv_start"] = jnp.array([5])
    output, *gradients = with_gradients(pallas_gpu.pallas_gpu, *arrays, **kwargs)
    assert not output[:, :5].any()
    assert output[:, 5:].any()
    for gradient in gradients:
        assert np.isfinite(gradient.astype(np.float32)).all()
        assert not gradient[:, :5].any()


@pytest.mark.slow
@pytest.mark.usefixtures("interpreted")
def test_documents_do_not_see_each_other():
    """Outputs and gradients of each are the same to the last bit, whatever the others hold."""
    length, starts = 23, [4, 5, 15]
    *arrays, cotangent = inputs(length, batch=1)

    def in_bfloat16(*arrays, **kwargs):
        arrays = (a.astype(jnp.bfloat16) for a in arrays)
        return attend(*arrays, function=pallas_gpu.pallas_gpu, **kwargs).astype(jnp.float32)

    ids = jnp.asarray(documents(length, starts, batch=1))
    assert_documents_apart(in_bfloat16, arrays, cotangent, [0, *starts], window=9, segment_ids=ids)


@pytest.mark.parametrize(
    ("offset", "meta", "window"),
    slow_but([(16, 16, 40), (37, 20, None), (0, 0, 33)], (16, 16, 40), (37, 20, None)),
)
def test_spans(offset, meta, window):
    """Blocks outside of them see nothing; those in full spans see everything."""
    queries, sizes = 64, small(offset, meta, None, 1.0)
    keys = -(-(offset + queries) // sizes.block) * sizes.block
    positions = np.arange(offset, offset + queries)
    rng = np.random.default_rng(offset)
    lowest = np.zeros((20, queries), np.int32)
    for row, starts in zip(lowest, rng.integers(0, offset + queries, (20, 3)), strict=True):
        row[:] = np.where(positions[:, None] >= starts, starts, 0).max(1)
    mask = attention_mask(
        jnp.asarray(positions)[None],
        jnp.arange(keys),
        window=window,
        num_meta_tokens=meta,
        kv_start=jnp.asarray(lowest),
    )
    if window is not None:
        lowest = np.maximum(lowest, positions - window)
    lowest = jnp.asarray(lowest, jnp.int32)

    by_block = np.asarray(mask).reshape(20, queries // 16, 16, keys // 16, 16)
    assert_spans(key_spans(lowest, keys, sizes), by_block, always=sizes.meta_blocks)
    by_block = np.asarray(mask).reshape(20, queries // 8, 8, keys // 16, 16)
    assert_spans(query_spans(lowest, keys, sizes), by_block.transpose(0, 3, 4, 1, 2))


def assert_spans(spans, mask, always=0):
    """Of the blocks of axis 1, among those of axis 3, of which the first are met always."""
    begin, end, full_begin, full_end = (v[..., None] for v in np.moveaxis(np.asarray(spans), 2, 0))
    block = np.arange(mask.shape[3])
    met = ((block >= begin) & (block < end)) | (block < always)
    assert not mask.any((2, 4))[~met].any()
    full = (block >= full_begin) & (block < full_end) & met
    assert full.any()
    assert mask.all((2, 4))[full].all()
    # Nor are blocks met in vain, but those that only queries between documents do not see.
    assert met.sum() < 1.5 * mask.any((2, 4)).sum()


@pytest.mark.parametrize(
    ("dtype", "head_dim", "value_dim"),
    [("float32", 64, 128), ("bfloat16", 80, 128), ("bfloat16", 64, 136)],
)
def test_what_it_does_not_support_is_refused(dtype, head_dim, value_dim):
    key = jnp.zeros((1, 4, 1, head_dim), dtype)
    value = jnp.zeros((1, 4, 1, value_dim), dtype)
    message = f"supports bfloat16, head_dim up to 64 .* not {dtype}, {head_dim} and {value_dim}"
    with pytest.raises(ValueError, match=message):
        pallas_gpu.pallas_gpu(key, key, value, window=None, num_meta_tokens=0)
