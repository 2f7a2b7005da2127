"""Every attention back end against a loop over queries in float64."""

from functools import partial
from unittest.mock import patch

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from hymba_jax.ops.attention import api, attention, attention_step
from hymba_jax.ops.attention.blocks import blocks
from hymba_jax.ops.attention.reference import attention_mask, reference

BATCH, HEADS, KV_HEADS, HEAD_DIM, VALUE_DIM = 2, 6, 2, 8, 12
# In blocks so small that short texts have several, cut everywhere in the window.
small_blocks = partial(blocks, block=5)
FUNCTIONS = {"blocks": small_blocks, "reference": reference}


def inputs(queries, keys=None, *, batch=BATCH, seed=0):
    """Queries, keys, values and a cotangent."""
    keys = keys or queries
    rng = np.random.default_rng(seed)
    shapes = [
        (queries, HEADS, HEAD_DIM),
        (keys, KV_HEADS, HEAD_DIM),
        (keys, KV_HEADS, VALUE_DIM),
        (queries, HEADS, VALUE_DIM),
    ]
    return [rng.normal(size=(batch, *shape)) for shape in shapes]


def cast(arrays, dtype=jnp.float32):
    return [jnp.asarray(a, dtype) for a in arrays]


def by_hand(query, key, value, window, num_meta_tokens, first_key=None, segment_ids=None):
    """One query, one head at a time, from the mask's words."""
    batch, queries, heads = query.shape[:3]
    firsts = [0] * batch if first_key is None else first_key
    output = np.zeros((*query.shape[:3], value.shape[-1]))
    for b, q, h in np.ndindex(batch, queries, heads):
        start, group = key.shape[1] - queries, h // (heads // key.shape[2])
        at, ids = start + q, np.zeros(queries) if segment_ids is None else segment_ids[b]
        seen = [
            k
            for k in range(at + 1)
            if k < num_meta_tokens
            or (
                (window is None or at - k <= window)
                and k >= firsts[b]
                and (ids[max(0, k - start) : q + 1] == ids[q]).all()
            )
        ]
        scores = key[b, seen, group] @ query[b, q, h] / np.sqrt(query.shape[-1])
        weights = np.exp(scores - scores.max())
        output[b, q, h] = weights @ value[b, seen, group] / weights.sum()
    return output


def with_gradients(function, query, key, value, doutput, **kwargs):
    """The output, and the gradients of query, key and value along its cotangent."""

    @jax.jit
    def both(arrays, doutput, places):
        output, vjp = jax.vjp(partial(function, **places, **sizes), *arrays)
        return output, *vjp(doutput)

    sizes = {k: v for k, v in kwargs.items() if not isinstance(v, jax.Array)}
    places = {k: v for k, v in kwargs.items() if isinstance(v, jax.Array)}
    return both((query, key, value), doutput, places)


def assert_close(ours, expected):
    """Float32 rounds at 6e-8, and sums have some tens of terms around 1."""
    for a, b in zip(ours, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def documents(length, starts, batch=BATCH):
    """Ids of one row, and of others with one document; they only differ from the one before."""
    segment_ids = np.zeros((batch, length), int)
    segment_ids[0, starts] = 1
    return segment_ids.cumsum(1) % 2


def of_documents(function):
    """`attention`, which puts documents in the terms of the implementations, with one of them."""

    def attend(*arrays, **kwargs):
        with (
            patch.dict(api.IMPLEMENTATIONS, chosen=function),
            patch.object(api, "KNOW_DOCUMENTS", ("chosen",)),
        ):
            return attention(*arrays, implementation="chosen", **kwargs)

    return attend


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize(
    ("length", "window", "meta", "starts"),
    [
        (1, None, 0, []),
        (23, None, 3, []),
        (23, 4, 3, []),
        (23, 4, 0, []),
        (23, 3, 8, []),
        (9, 30, 2, []),
        (3, 2, 9, []),
        (23, None, 3, [3, 7, 8, 15]),
        (23, 4, 0, [7, 8, 22]),
    ],
)
def test_values_and_gradients(name, length, window, meta, starts):
    """The gradients along a random direction, against central differences in float64."""
    *arrays, cotangent = inputs(length)
    *directions, _ = inputs(length, seed=1)
    segment_ids = documents(length, starts) if starts else None
    output, *gradients = with_gradients(
        of_documents(FUNCTIONS[name]),
        *cast([*arrays, cotangent]),
        window=window,
        num_meta_tokens=meta,
        segment_ids=segment_ids if segment_ids is None else jnp.asarray(segment_ids),
    )
    expected = by_hand(*arrays, window, meta, segment_ids=segment_ids)
    np.testing.assert_allclose(output, expected, rtol=0, atol=2e-6)
    step = 1e-5
    for i, direction in enumerate(directions):
        shifted = [
            [a + sign * step * direction if i == j else a for j, a in enumerate(arrays)]
            for sign in (1, -1)
        ]
        plus, minus = (
            np.sum(by_hand(*a, window, meta, segment_ids=segment_ids) * cotangent) for a in shifted
        )
        expected = (plus - minus) / (2 * step)
        ours = np.sum(np.asarray(gradients[i], np.float64) * direction)
        scale = np.linalg.norm(gradients[i]) * np.linalg.norm(direction)
        assert abs(ours - expected) <= 1e-5 * max(scale, 1)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize(("length", "window", "meta"), [(23, None, 3), (23, 4, 3)])
def test_bfloat16(name, length, window, meta):
    """Weights and values are rounded to 8 bits, their products summed in more: 2 * 2**-8."""
    arrays = cast(inputs(length), jnp.bfloat16)
    ours, *gradients = with_gradients(FUNCTIONS[name], *arrays, window=window, num_meta_tokens=meta)
    assert {a.dtype for a in (ours, *gradients)} == {jnp.dtype("bfloat16")}
    query, key, value, _ = exact = [np.asarray(a, np.float64) for a in arrays]
    bound = 2 * 2**-8 * np.abs(value).max()
    expected = by_hand(query, key, value, window, meta)
    np.testing.assert_allclose(ours.astype(jnp.float32), expected, rtol=0, atol=bound)
    # The gradients sum such terms over queries or keys, in bfloat16 as well.
    kwargs = {"window": window, "num_meta_tokens": meta}
    _, *expected = with_gradients(reference, *cast(exact), **kwargs)
    for a, b in zip(gradients, expected, strict=True):
        atol = 4 * 2**-8 * max(1, np.abs(b).max())
        np.testing.assert_allclose(a.astype(jnp.float32), b, rtol=0, atol=atol)


# Rows begin with the meta tokens, or later; the rest of a document, two of one position that have
# the same id, and two more.
IDS = np.array([0, 0, 0, 1, 0, 2, 2, 2, 2, 2, 3, 3, 3])
PLACES = {
    "at once": {},
    "after padding": {"first_key": [20, 6]},
    "documents": {"segment_ids": np.stack([IDS, IDS[::-1]])},
    "documents after padding": {"first_key": [20, 6], "segment_ids": np.stack([IDS, IDS[::-1]])},
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(("window", "meta"), [(None, 3), (7, 4)])
def test_fewer_queries_than_keys(name, place, window, meta):
    kwargs = {k: jnp.asarray(v) for k, v in PLACES[place].items()}
    kwargs |= {"window": window, "num_meta_tokens": meta}
    *exact, _ = arrays = inputs(13, 37)
    ours = with_gradients(of_documents(FUNCTIONS[name]), *cast(arrays), **kwargs)
    expected = by_hand(*exact, window, meta, **PLACES[place])
    np.testing.assert_allclose(ours[0], expected, rtol=0, atol=2e-6)
    assert_close(ours, with_gradients(of_documents(reference), *cast(arrays), **kwargs))


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("window", [None, 4])
def test_documents_do_not_see_each_other(name, window):
    """Outputs and gradients of each are the same to the last bit, whatever the others hold."""
    length, meta, starts = 23, 3, [3, 7, 8, 15]
    *arrays, cotangent = inputs(length, batch=1)
    kwargs = {"window": window, "num_meta_tokens": meta}
    kwargs["segment_ids"] = jnp.asarray(documents(length, starts, batch=1))
    assert_documents_apart(of_documents(FUNCTIONS[name]), arrays, cotangent, starts, **kwargs)


def assert_documents_apart(function, arrays, cotangent, starts, **kwargs):
    @jax.jit
    def both(arrays, cotangent):
        output, vjp = jax.vjp(partial(function, **kwargs), *arrays)
        return output, *vjp(cotangent)

    length = cotangent.shape[1]
    for first, end in zip(starts, [*starts[1:], length], strict=True):
        other = np.ones(length, bool)
        other[first:end] = other[: starts[0]] = False  # what comes before are meta tokens
        changed = [np.where(other[None, :, None, None], -2 * a, a) for a in arrays]
        of_own = cotangent.copy()
        of_own[:, :first] = of_own[:, end:] = 0
        of_own = jnp.asarray(of_own, jnp.float32)
        output, *gradients = both(cast(arrays), of_own)
        still, *gradients_still = both(cast(changed), of_own)
        np.testing.assert_array_equal(still[:, first:end], output[:, first:end])
        for after, before in zip(gradients_still, gradients, strict=True):
            np.testing.assert_array_equal(after, before)
            assert not before[:, other].any()


@pytest.mark.parametrize("window", [None, 40])
def test_blocks_of_the_default_size(window):
    """Several of them, and several windows."""
    arrays = cast(inputs(600, batch=1))
    kwargs = {"window": window, "num_meta_tokens": 10}
    ours = with_gradients(blocks, *arrays, **kwargs)
    assert_close(ours, with_gradients(reference, *arrays, **kwargs))


def test_blocks_in_a_scan_of_checkpoints():
    """As a stack of layers runs them."""
    *arrays, cotangent = cast(inputs(23))

    def layers(function, query, key, value):
        @jax.checkpoint
        def layer(x, _):
            output = function(x, key, value, window=4, num_meta_tokens=3)
            return x + output[..., :HEAD_DIM], output

        return jax.lax.scan(layer, query, None, length=3)[1][-1]

    ours, expected = (
        with_gradients(partial(layers, function), *arrays, cotangent)
        for function in (small_blocks, reference)
    )
    assert_close(ours, expected)


def test_a_query_that_sees_nothing_gives_nothing():
    """Such are the positions before a text that is padded on the left."""
    arrays = cast(inputs(12))
    kwargs = {"window": None, "num_meta_tokens": 0, "first_key": jnp.array([7, 7])}
    output, *gradients = with_gradients(small_blocks, *arrays, **kwargs)
    assert not output[:, :7].any()
    assert all(jnp.isfinite(g).all() and not g[:, :7].any() for g in gradients)


def test_blocks_need_memory_linear_in_the_length():
    def megabytes(length, window):
        arrays = cast(inputs(length, batch=1))
        both = jax.jit(partial(with_gradients, blocks, window=window, num_meta_tokens=8))
        return both.lower(*arrays).compile().memory_analysis().temp_size_in_bytes / 1e6

    for window in (None, 100):
        short, long = megabytes(1024, window), megabytes(4096, window)
        assert long < 4 * short
        assert long < 4 * 4096**2 / 1e6  # one head's scores, of which there are six


def scores_computed(length, window, meta, **kwargs):
    """How many of one head, forward and backward, when Python runs the loops."""
    einsum, sizes = jnp.einsum, []

    def counting(subscripts, *operands, **options):
        output = einsum(subscripts, *operands, **options, preferred_element_type=jnp.float32)
        if subscripts == "bhgqd,bkhd->bhgqk":
            sizes.append(output.shape[-2] * output.shape[-1])
        return output

    arrays = cast(inputs(length, kwargs.pop("keys", length), batch=1))
    small = partial(blocks, window=window, num_meta_tokens=meta, block=16, **kwargs)
    with patch("hymba_jax.ops.attention.blocks._einsum", counting), jax.disable_jit():
        with_gradients(small, *arrays)
    return sum(sizes) / 2


def test_blocks_compute_what_the_mask_shows():
    """Besides the meta tokens, a block of 16 queries meets its window of 16 and itself."""
    assert scores_computed(32, 16, 4) == 32 * 4 + 16 * (16 + 32)
    assert scores_computed(64, 16, 4) == 64 * 4 + 16 * (16 + 3 * 32)
    # Without a window, all that came before and itself.
    assert scores_computed(48, None, 0) == 16 * (16 + 32 + 48)


def test_blocks_compute_what_rows_use():
    """Of a long buffer of keys, the meta tokens and those from first_key on."""
    first_key = jnp.array([400 - 32])
    assert scores_computed(16, None, 4, keys=400, first_key=first_key) == 16 * (4 + 32)


def test_blocks_compute_what_documents_use():
    """Of two blocks of queries each, besides the meta tokens."""
    first_key = jnp.repeat(jnp.array([[0, 32]]), 32, axis=1)
    assert scores_computed(64, None, 4, first_key=first_key) == 64 * 4 + 16 * 2 * (16 + 32)


def test_blocks_split_over_devices_by_rows():
    """Every device computes its rows alone: no array of them is gathered."""
    devices = jax.devices()
    rows = NamedSharding(Mesh(np.asarray(devices), ("data",)), PartitionSpec("data"))
    arrays = cast(inputs(11, 23, batch=len(devices)))
    first_key = jnp.arange(len(devices)) % 3 + 3

    def both(arrays, first_key):
        kwargs = {"window": 6, "num_meta_tokens": 2, "first_key": first_key}
        return with_gradients(small_blocks, *arrays, **kwargs)

    split = jax.device_put((arrays, first_key), rows)
    compiled = jax.jit(both).lower(*split).compile()
    ours = compiled(*split)
    assert all(a.sharding.is_equivalent_to(rows, a.ndim) for a in ours)
    assert "all-gather" not in compiled.as_text()
    assert_close(ours, jax.jit(both)(arrays, first_key))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("meta", [0, 3])
def test_a_step_sees_meta_tokens_filled_slots_and_itself(meta, dtype):
    """In slots of any order, whatever the empty ones hold; one row has none filled."""
    slots, filled = 9, [0, 4, 9]
    query, key, value, _ = (np.asarray(a) for a in inputs(1, meta + slots + 1, batch=3))
    key[1:, :meta], value[1:, :meta] = key[:1, :meta], value[:1, :meta]
    order = np.random.default_rng(3).permutation(slots)
    expected = []
    for b, count in enumerate(filled):
        seen = [*range(meta), *(meta + order[:count]), meta + slots]
        row = query[[b]], key[[b]][:, seen], value[[b]][:, seen]
        expected.append(by_hand(*row, None, 0)[0, 0])
    past = (a[:, meta + order].swapaxes(1, 2) for a in (key, value))
    past_key, past_value = cast(past, dtype)
    meta_key, meta_value = cast((a[0, :meta].swapaxes(0, 1) for a in (key, value)), dtype)
    ours = jax.jit(attention_step)(
        *cast((query[:, 0], key[:, -1], value[:, -1]), dtype),
        past_key=past_key,
        past_value=past_value,
        past_length=jnp.asarray(filled),
        meta_key=meta_key,
        meta_value=meta_value,
    )
    assert ours.dtype == dtype
    # Rounding of inputs, weights and values to 8 bits, or of float32.
    atol = 2e-6 if dtype == "float32" else 4 * 2**-8 * np.abs(value).max()
    np.testing.assert_allclose(ours.astype(jnp.float32), expected, rtol=0, atol=atol)


def test_the_mask_counts_absolute_positions():
    """A piece of the queries sees what it would see among all of them."""
    everything = jnp.arange(40)
    whole = attention_mask(everything[None], everything, window=5, num_meta_tokens=3)
    piece = attention_mask(everything[None, 30:], everything[:35], window=5, num_meta_tokens=3)
    np.testing.assert_array_equal(piece, whole[:, 30:, :35])
    assert whole[0, 30].nonzero()[0].tolist() == [0, 1, 2, *range(25, 31)]


@pytest.mark.parametrize("implementation", [None, *FUNCTIONS])
def test_one_call_chooses(implementation):
    *arrays, _ = inputs(7, 9)
    first_key = [3, 1]
    ours = attention(
        *cast(arrays),
        window=3,
        num_meta_tokens=1,
        implementation=implementation,
        first_key=jnp.asarray(first_key),
    )
    np.testing.assert_allclose(ours, by_hand(*arrays, 3, 1, first_key), rtol=0, atol=2e-6)


def test_an_unknown_implementation_is_refused():
    *arrays, _ = cast(inputs(3))
    with pytest.raises(
        ValueError, match="no attention 'fastest'; there are blocks, cudnn, reference, splash"
    ):
        attention(*arrays, window=None, num_meta_tokens=0, implementation="fastest")
