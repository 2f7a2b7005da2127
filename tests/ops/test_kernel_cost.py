"""What kernels state of themselves, by hand."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jaxprs import stated_costs

from hymba_jax.ops.attention.pallas_gpu import pallas_gpu
from hymba_jax.ops.attention.pallas_tpu import pallas_tpu
from hymba_jax.ops.kernel_cost import block_bytes, visited_blocks
from hymba_jax.ops.selective_scan import selective_scan
from hymba_jax.ops.ssd import ssd


def test_a_block_is_copied_whenever_its_index_changes():
    """Programs (0, 0), (0, 1), (0, 2), (1, 0), ...: a row's block stays, a column's comes anew."""
    array = jax.ShapeDtypeStruct((8, 12), jnp.float32)
    specs = [
        pl.BlockSpec((4, 12), lambda i, j: (i, 0)),
        pl.BlockSpec((8, 4), lambda i, j: (0, j)),
        pl.BlockSpec((8, 12), lambda i, j: (0, 0)),
    ]
    size = 8 * 12 * 4
    for spec, copies in zip(specs, (1, 2, 1), strict=True):
        assert block_bytes((2, 3), [spec], [array]) == copies * size
    assert block_bytes((2, 3), specs, [array] * 3) == 4 * size


@pytest.mark.parametrize("window", [None, 300, 20])
@pytest.mark.parametrize("start", [0, 256])
@pytest.mark.parametrize("always", [0, 1])
def test_blocks_that_a_window_visits(window, start, always):
    queries, block_q, block_k = 512, 128, 64
    query = start + np.arange(queries)[:, None]
    key = np.arange(start + queries)[None]
    seen = key <= query
    if window is not None:
        seen &= (query - key <= window) | (key < always * block_k)
    pairs = seen.reshape(queries // block_q, block_q, -1, block_k).any(axis=(1, 3))
    counted = visited_blocks(start, queries, start + queries, window, block_q, block_k, always)
    assert counted == pairs.sum()


def gradient(function):
    """The output and all gradients, as a training step needs them."""

    def run(*arrays):
        output, vjp = jax.vjp(function, *arrays)
        return output, vjp(output)

    return run


@pytest.mark.parametrize(
    ("attention", "widths"),
    [(pallas_tpu, [64 + 128, 3 * 64 + 2 * 128]), (pallas_gpu, [192, 256, 384])],
)
def test_attention_states_the_scores_that_it_computes(attention, widths):
    """Two rows, two heads of one key/value head, 512 queries behind 128 meta tokens, in a window of
    100. TPUs take blocks of 256: 128 meta tokens each, and their own block, the second also the one
    before. GPUs take 128: the meta tokens, the own, and all but the first the one before."""
    arrays = [
        jax.ShapeDtypeStruct((2, n, heads, width), jnp.bfloat16)
        for n, heads, width in ((512, 2, 64), (640, 1, 64), (640, 1, 128))
    ]

    def run(*arrays):
        return attention(*arrays, window=100, num_meta_tokens=128)

    on_tpu = attention is pallas_tpu
    of_head = 512 * 128 + 3 * 256**2 if on_tpu else (4 + 4 + 3) * 128**2
    scores = 2 * 2 * of_head
    costs = stated_costs(gradient(run), *arrays)
    assert [cost.transcendentals for cost in costs] == [scores] * len(widths)
    assert [cost.flops for cost in costs] == [2 * width * scores for width in widths]


@pytest.mark.parametrize("implementation", ["pallas_tpu", "pallas_gpu"])
def test_the_scan_states_its_exponentials_and_bytes(implementation):
    """Two rows, 512 positions, 1280 channels, which TPUs take in two chunks, and in two blocks that
    share B and C."""
    sequence = jax.ShapeDtypeStruct((2, 512, 1280), jnp.float32)
    projection = jax.ShapeDtypeStruct((2, 512, 16), jnp.float32)
    A, D = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((16, 1280), (1280,)))

    def run(x, dt, A, B, C, D, z):
        return selective_scan(x, dt, A, B, C, D, z, D, implementation=implementation)

    arrays = (sequence, sequence, A, projection, projection, D, sequence)
    forward, backward = stated_costs(gradient(run), *arrays)
    positions = 2 * 512 * 1280
    assert forward.transcendentals == positions * (16 + 2)
    assert backward.transcendentals == positions * (2 * 16 + 3)
    if implementation == "pallas_tpu":
        state = 2 * 16 * 1280
        once = 4 * positions + 2 * state + 2 * state  # x, dt, z, y; first, last and chunks' states
        once += 2 * 2 * 512 * 16 + (16 + 2) * 1280  # B and C; A, D and the bias, for all rows
        assert forward.bytes_accessed == 4 * once
        # Matmuls, 16 positions at a time: y; then y again, and gradients of B, C, u and delta.
        terms = positions * 16
        assert [cost.flops for cost in (forward, backward)] == [2 * 16 * terms, 5 * 2 * 16 * terms]


def test_ssd_states_its_matmuls_exponentials_and_bytes():
    """Two rows, two chunks of 128 positions, four heads of 64 channels, of one group, 128 states.
    Rows of one number per head are padded to 8 heads."""
    x = jax.ShapeDtypeStruct((2, 256, 4, 64), jnp.float32)
    dt = jax.ShapeDtypeStruct((2, 256, 4), jnp.float32)
    A = jax.ShapeDtypeStruct((4,), jnp.float32)
    B = jax.ShapeDtypeStruct((2, 256, 1, 128), jnp.float32)
    forward, backward = stated_costs(
        gradient(partial(ssd, implementation="pallas_tpu")), x, dt, A, B, B
    )
    positions, channels = 2 * 256, 4 * 64
    for cost in (forward, backward):
        assert cost.transcendentals == positions * 4 * (128 + 2)
    # A position has 128 weights; it reads a state, and adds to one. Scores are of the group.
    assert forward.flops == positions * (2 * channels * (128 + 2 * 128) + 2 * 128 * 128)
    assert backward.flops == positions * (2 * channels * (3 * 128 + 5 * 128) + 3 * 2 * 128 * 128)
    of_heads, of_groups, states = positions * 8, positions * 128, 2 * channels * 128
    once = 2 * positions * channels + 2 * of_heads + 2 * of_groups + 2 * states + 2 * states
    assert forward.bytes_accessed == 4 * (once + 8)  # and D
    # x, dy, dx; delta, the exponents, their gradients and D's; B, C and theirs; states as before.
    once = 3 * positions * channels + 5 * of_heads + 4 * of_groups + 2 * states + 2 * states
    assert backward.bytes_accessed == 4 * (once + 8)
