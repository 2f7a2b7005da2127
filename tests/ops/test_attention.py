"""Every attention back end against a loop over queries in float64."""

from functools import cache, partial
from unittest.mock import patch

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from slow import slow_but

from hymba_jax.ops.attention import api, attention, attention_step
from hymba_jax.ops.attention.blocks import blocks
from hymba_jax.ops.attention.reference import attention_mask, reference
from hymba_jax.ops.int8_rows import Int8Rows

BATCH, HEADS, KV_HEADS, HEAD_DIM, VALUE_DIM = 2, 6, 2, 8, 12
# In blocks so small that short sequences have several, cut everywhere in the window.
small_blocks = partial(blocks, block=5)
FUNCTIONS = {"blocks": small_blocks, "reference": reference}


def inputs(queries, keys=None, *, meta=3, batch=BATCH, seed=0):
    """Queries, keys, values, keys and values of meta tokens, and a cotangent."""
    keys = keys or queries
    rng = np.random.default_rng(seed)
    shapes = [
        (batch, queries, HEADS, HEAD_DIM),
        (batch, keys, KV_HEADS, HEAD_DIM),
        (batch, keys, KV_HEADS, VALUE_DIM),
        (meta, KV_HEADS, HEAD_DIM),
        (meta, KV_HEADS, VALUE_DIM),
        (batch, queries, HEADS, VALUE_DIM),
    ]
    return [rng.normal(size=shape) for shape in shapes]


def cast(arrays, dtype=jnp.float32):
    return [jnp.asarray(a, dtype) for a in arrays]


def by_hand(query, key, value, meta_key, meta_value, window, kv_start=None, segment_ids=None):
    """One query, one head at a time, from the mask's words."""
    batch, queries, heads = query.shape[:3]
    firsts = [0] * batch if kv_start is None else kv_start
    output = np.zeros((*query.shape[:3], value.shape[-1]))
    for b, q, h in np.ndindex(batch, queries, heads):
        start, group = key.shape[1] - queries, h // (heads // key.shape[2])
        at, ids = start + q, np.zeros(queries) if segment_ids is None else segment_ids[b]
        seen = [
            k
            for k in range(at + 1)
            if (window is None or at - k <= window)
            and k >= firsts[b]
            and (ids[max(0, k - start) : q + 1] == ids[q]).all()
        ]
        keys = np.concatenate([meta_key[:, group], key[b, seen, group]])
        values = np.concatenate([meta_value[:, group], value[b, seen, group]])
        scores = keys @ query[b, q, h] / np.sqrt(query.shape[-1])
        weights = np.exp(scores - scores.max())
        output[b, q, h] = weights @ values / weights.sum()
    return output


def attend(query, key, value, meta_key, meta_value, *, function=None, **kwargs):
    """`attention`, by this implementation."""
    known = patch.object(api, "SUPPORT_SEGMENT_IDS", (*api.SUPPORT_SEGMENT_IDS, "chosen"))
    with patch.dict(api.IMPLEMENTATIONS, chosen=function), known:
        return attention(
            query,
            key,
            value,
            meta_key=meta_key,
            meta_value=meta_value,
            implementation=function and "chosen",
            **kwargs,
        )


@cache
def attend_by(function):
    """The same object every time, by which JAX knows what it has compiled."""
    return partial(attend, function=function)


@cache
def program_of(function, sizes):
    @jax.jit
    def both(arrays, doutput, places):
        output, vjp = jax.vjp(partial(function, **places, **dict(sizes)), *arrays)
        return output, *vjp(doutput)

    return both


def with_gradients(function, *arrays, **kwargs):
    """The output, and the gradients of all arrays but the last along that cotangent."""
    sizes = tuple((k, v) for k, v in kwargs.items() if not isinstance(v, jax.Array))
    places = {k: v for k, v in kwargs.items() if isinstance(v, jax.Array)}
    *arrays, doutput = arrays
    return program_of(function, sizes)(tuple(arrays), doutput, places)


def assert_close(actual, expected):
    """Float32 rounds at 6e-8, and sums have some tens of terms around 1."""
    for a, b in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def documents(length, starts, batch=BATCH):
    """Ids of one row, and of others with one document; they only differ from the one before."""
    segment_ids = np.zeros((batch, length), int)
    segment_ids[0, starts] = 1
    return segment_ids.cumsum(1) % 2


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize(
    ("length", "window", "meta", "starts"),
    slow_but(
        [
            (1, None, 0, []),
            (23, None, 3, []),
            (23, 4, 3, []),
            (23, 4, 0, []),
            (23, 3, 8, []),
            (9, 30, 2, []),
            (3, 2, 9, []),
            (23, None, 3, [4, 7, 8, 15]),
            (23, 4, 0, [7, 8, 22]),
        ],
        (1, None, 0, []),
        (23, 4, 3, []),
        (3, 2, 9, []),
        (23, None, 3, [4, 7, 8, 15]),
    ),
)
def test_values_and_gradients(name, length, window, meta, starts):
    """The gradients along a random direction, against central differences in float64."""
    *arrays, cotangent = inputs(length, meta=meta)
    *directions, _ = inputs(length, meta=meta, seed=1)
    segment_ids = documents(length, starts) if starts else None
    output, *gradients = with_gradients(
        attend_by(FUNCTIONS[name]),
        *cast([*arrays, cotangent]),
        window=window,
        segment_ids=segment_ids if segment_ids is None else jnp.asarray(segment_ids),
    )
    expected = by_hand(*arrays, window, segment_ids=segment_ids)
    np.testing.assert_allclose(output, expected, rtol=0, atol=2e-6)
    step = 1e-5
    for i, direction in enumerate(directions):
        shifted = [
            [a + sign * step * direction if i == j else a for j, a in enumerate(arrays)]
            for sign in (1, -1)
        ]
        plus, minus = (
            np.sum(by_hand(*a, window, segment_ids=segment_ids) * cotangent) for a in shifted
        )
        expected = (plus - minus) / (2 * step)
        actual = np.sum(np.asarray(gradients[i], np.float64) * direction)
        scale = np.linalg.norm(gradients[i]) * np.linalg.norm(direction)
        assert abs(actual - expected) <= 1e-5 * max(scale, 1)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("window", slow_but([None, 4], 4))
def test_bfloat16(name, window):
    """Weights and values are rounded to 8 bits, their products summed in more: 2 * 2**-8."""
    arrays = cast(inputs(23), jnp.bfloat16)
    results = with_gradients(attend_by(FUNCTIONS[name]), *arrays, window=window)
    actual, *gradients = jax.device_get(results)
    assert {a.dtype for a in (actual, *gradients)} == {jnp.dtype("bfloat16")}
    *exact, _ = all_exact = [np.asarray(a, np.float64) for a in arrays]
    bound = 2 * 2**-8 * max(np.abs(exact[2]).max(), np.abs(exact[4]).max())
    expected = by_hand(*exact, window)
    np.testing.assert_allclose(actual.astype(np.float32), expected, rtol=0, atol=bound)
    # The gradients sum such terms over queries or keys, in bfloat16 as well.
    _, *expected = with_gradients(attend_by(reference), *cast(all_exact), window=window)
    for a, b in zip(gradients, expected, strict=True):
        atol = 4 * 2**-8 * max(1, np.abs(b).max())
        np.testing.assert_allclose(a.astype(np.float32), b, rtol=0, atol=atol)


# Rows begin with the first key, or later; the rest of a document, two of one position that have
# the same id, and two more.
IDS = np.array([0, 0, 0, 1, 0, 2, 2, 2, 2, 2, 3, 3, 3])
PLACES = {
    "at once": {},
    "after padding": {"kv_start": [20, 6]},
    "documents": {"segment_ids": np.stack([IDS, IDS[::-1]])},
    "documents after padding": {"kv_start": [20, 6], "segment_ids": np.stack([IDS, IDS[::-1]])},
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize(
    ("place", "window", "meta"),
    slow_but(
        [(place, *sizes) for place in PLACES for sizes in ((None, 3), (7, 4))],
        ("after padding", None, 3),
        ("documents after padding", 7, 4),
    ),
)
def test_fewer_queries_than_keys(name, place, window, meta):
    kwargs = {k: jnp.asarray(v) for k, v in PLACES[place].items()}
    kwargs |= {"window": window}
    *exact, _ = arrays = inputs(13, 37, meta=meta)
    actual = with_gradients(attend_by(FUNCTIONS[name]), *cast(arrays), **kwargs)
    expected = by_hand(*exact, window, **PLACES[place])
    np.testing.assert_allclose(actual[0], expected, rtol=0, atol=2e-6)
    assert_close(actual, with_gradients(attend_by(reference), *cast(arrays), **kwargs))


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("window", slow_but([None, 4], 4))
def test_documents_do_not_see_each_other(name, window):
    """Outputs and gradients of each are the same to the last bit, whatever the others hold."""
    length, starts = 23, [4, 5, 15]
    *arrays, cotangent = inputs(length, batch=1)
    kwargs = {"window": window}
    kwargs["segment_ids"] = jnp.asarray(documents(length, starts, batch=1))
    function = attend_by(FUNCTIONS[name])
    assert_documents_apart(function, arrays, cotangent, [0, *starts], **kwargs)


def assert_documents_apart(function, arrays, cotangent, starts, **kwargs):
    @jax.jit
    def compiled(arrays, cotangent):
        output, vjp = jax.vjp(partial(function, **kwargs), *arrays)
        return output, *vjp(cotangent)

    def both(*arguments):
        return jax.device_get(compiled(*arguments))

    length = cotangent.shape[1]
    for first, end in zip(starts, [*starts[1:], length], strict=True):
        other = np.ones(length, bool)
        other[first:end] = False
        changed = [np.where(other[None, :, None, None], -2 * a, a) for a in arrays[:3]]
        changed += arrays[3:]
        of_own = cotangent.copy()
        of_own[:, :first] = of_own[:, end:] = 0
        of_own = jnp.asarray(of_own, jnp.float32)
        output, *gradients = both(cast(arrays), of_own)
        still, *gradients_still = both(cast(changed), of_own)
        np.testing.assert_array_equal(still[:, first:end], output[:, first:end])
        for after, before in zip(gradients_still, gradients, strict=True):
            np.testing.assert_array_equal(after, before)
        assert not any(before[:, other].any() for before in gradients[:3])


@pytest.mark.parametrize("window", slow_but([None, 40], 40))
def test_blocks_of_the_default_size(window):
    """Several of them, and several windows."""
    arrays = cast(inputs(600, meta=10, batch=1))
    actual, expected = (
        with_gradients(attend_by(function), *arrays, window=window)
        for function in (blocks, reference)
    )
    assert_close(actual, expected)


def test_blocks_in_a_scan_of_checkpoints():
    """As a stack of layers runs them."""
    *arrays, cotangent = cast(inputs(23))

    def layers(function, query, *others):
        @jax.checkpoint
        def layer(x, _):
            output = attend(x, *others, function=function, window=4)
            return x + output[..., :HEAD_DIM], output

        return jax.lax.scan(layer, query, None, length=3)[1][-1]

    actual, expected = (
        with_gradients(partial(layers, function), *arrays, cotangent)
        for function in (small_blocks, reference)
    )
    assert_close(actual, expected)


def test_a_query_that_sees_nothing_gives_nothing():
    """Such are the positions before a sequence that is padded on the left."""
    arrays = cast(inputs(12, meta=0))
    kwargs = {"window": None, "kv_start": jnp.array([7, 7])}
    results = with_gradients(attend_by(small_blocks), *arrays, **kwargs)
    output, *gradients = jax.device_get(results)
    assert not output[:, :7].any()
    assert all(np.isfinite(g).all() and not g[:, :7].any() for g in gradients[:3])


@pytest.mark.parametrize("window", slow_but([None, 100], None))
def test_blocks_need_memory_linear_in_the_length(window):
    def megabytes(length):
        arrays = cast(inputs(length, meta=8, batch=1))
        both = jax.jit(partial(with_gradients, attend_by(blocks), window=window))
        return both.lower(*arrays).compile().memory_analysis().temp_size_in_bytes / 1e6

    short, long = megabytes(1024), megabytes(4096)
    assert long < 4 * short
    assert long < 4 * 4096**2 / 1e6  # one head's scores, of which there are six


def scores_computed(length, window, meta=4, **kwargs):
    """How many of one head, forward and backward, when Python runs the loops.

    Single operations are compiled for these, so all have blocks of the same few shapes.
    """
    einsum, sizes = jnp.einsum, []

    def counting(subscripts, *operands, **options):
        output = einsum(subscripts, *operands, **options, preferred_element_type=jnp.float32)
        computed = not isinstance(output, jax.core.Tracer)  # which is there for its shape alone
        if computed and subscripts == "bhgqd,bkhd->bhgqk":
            sizes.append(output.shape[-2] * output.shape[-1])
        return output

    arrays = cast(inputs(length, kwargs.pop("keys", length), meta=meta, batch=1))
    function = partial(attend, function=partial(blocks, block=16), window=window, **kwargs)
    with patch("hymba_jax.ops.attention.blocks._einsum", counting), jax.disable_jit():
        with_gradients(function, *arrays)
    return sum(sizes) / 2


def test_blocks_compute_what_the_mask_shows():
    """Besides the meta tokens, a block of 16 queries meets its window of 16 and itself."""
    assert scores_computed(48, 16) == 48 * 4 + 16 * (16 + 2 * 32)
    # Without a window, all that came before and itself.
    assert scores_computed(48, None) == 48 * 4 + 16 * (16 + 32 + 48)


def test_blocks_compute_what_rows_use():
    """Of a long buffer of keys, the meta tokens and those from kv_start on."""
    kv_start = jnp.array([400 - 32])
    assert scores_computed(16, None, keys=400, kv_start=kv_start) == 16 * (4 + 32)


def test_blocks_compute_what_documents_use():
    """Of one block of queries and of two, besides the meta tokens."""
    segment_ids = jnp.asarray(np.repeat([[0, 1]], [16, 32], axis=1))
    expected = 48 * 4 + 16 * (16 + 16 + 32)
    assert scores_computed(48, None, segment_ids=segment_ids) == expected


def test_blocks_split_over_devices_by_rows():
    """Every device computes its rows: no array of them is gathered."""
    devices = jax.devices()
    rows = NamedSharding(Mesh(np.asarray(devices), ("data",)), PartitionSpec("data"))
    arrays = cast(inputs(11, 23, meta=0, batch=len(devices)))
    query, key, value, *_, doutput = arrays
    kv_start = jnp.arange(len(devices)) % 3 + 3

    def both(arrays, kv_start):
        kwargs = {"window": 6, "num_meta_tokens": 2, "kv_start": kv_start}
        return with_gradients(small_blocks, *arrays, **kwargs)

    arrays = query, key, value, doutput
    split = jax.device_put((arrays, kv_start), rows)
    compiled = jax.jit(both).lower(*split).compile()
    actual = compiled(*split)
    assert all(a.sharding.is_equivalent_to(rows, a.ndim) for a in actual)
    assert "all-gather" not in compiled.as_text()
    assert_close(actual, jax.jit(both)(arrays, kv_start))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("meta", [0, 3])
def test_a_step_sees_meta_tokens_filled_slots_and_itself(meta, dtype):
    """In slots of any order, whatever the empty ones hold; one row has none filled."""
    slots, filled = 9, [0, 4, 9]
    query, key, value, meta_key, meta_value, _ = inputs(1, slots + 1, meta=meta, batch=3)
    order = np.random.default_rng(3).permutation(slots)
    expected = []
    for b, count in enumerate(filled):
        seen = [*order[:count], slots]
        row = query[[b]], key[[b]][:, seen], value[[b]][:, seen]
        expected.append(by_hand(*row, meta_key, meta_value, None)[0, 0])
    past = (a[:, order].swapaxes(1, 2) for a in (key, value))
    past_key, past_value = cast(past, dtype)
    by_head = cast((a.swapaxes(0, 1) for a in (meta_key, meta_value)), dtype)
    actual = jax.jit(attention_step)(
        *cast((query[:, 0], key[:, -1], value[:, -1]), dtype),
        past_key=past_key,
        past_value=past_value,
        past_length=jnp.asarray(filled),
        meta_key=by_head[0],
        meta_value=by_head[1],
    )
    assert actual.dtype == dtype
    # Rounding of inputs, weights and values to 8 bits, or of float32.
    largest = max(np.abs(value).max(), np.abs(meta_value).max(initial=0))
    atol = 2e-6 if dtype == "float32" else 4 * 2**-8 * largest
    np.testing.assert_allclose(actual.astype(jnp.float32), expected, rtol=0, atol=atol)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_step_with_a_cache_of_8_bits(dtype):
    """Is that with the floats which the cache stands for, whose scales differ by 1000 here."""
    slots, filled = 9, jnp.asarray([0, 4, 9])
    query, key, value, meta_key, meta_value, _ = inputs(1, slots + 1, meta=3, batch=3)
    spread = np.geomspace(1, 1e-3, slots)[:, None, None]
    past = cast((a.swapaxes(1, 2) for a in (key[:, :-1], value[:, :-1] * spread)), dtype)
    past_key, past_value = map(Int8Rows.of, past)
    by_head = cast((a.swapaxes(0, 1) for a in (meta_key, meta_value)), dtype)
    step = partial(jax.jit(attention_step), *cast((query[:, 0], key[:, -1], value[:, -1]), dtype))
    step = partial(step, past_length=filled, meta_key=by_head[0], meta_value=by_head[1])
    actual = step(past_key=past_key, past_value=past_value)
    floats = (a.astype(dtype) for a in (past_key, past_value))
    expected = step(**dict(zip(("past_key", "past_value"), floats, strict=True)))
    # Another order of multiplying in float32; in bfloat16 keys, weights and values are rounded.
    largest = max(np.abs(value).max(), np.abs(meta_value).max())
    atol = (2e-6 if dtype == "float32" else 4 * 2**-8) * largest
    np.testing.assert_allclose(*cast((actual, expected), "float32"), rtol=0, atol=atol)


def test_rows_of_8_bits():
    """Scales and integers by numpy; to nearest, so within half a scale."""
    x = np.random.default_rng(0).normal(size=(3, 4, 6)).astype(np.float32)
    x[1, 2] = 0
    rows = Int8Rows.of(jnp.asarray(x))
    scale = np.abs(x).max(-1, keepdims=True) / np.float32(127)
    scale[1, 2] = np.float32(1) / 127
    np.testing.assert_allclose(rows.scale, scale, rtol=2e-7)  # XLA multiplies by 1/127
    np.testing.assert_array_equal(rows.integers, np.rint(x / np.asarray(rows.scale)))
    assert (np.abs(rows.astype("float32") - x) <= scale / 2 * (1 + 1e-6)).all()
    coarse = Int8Rows.of(jnp.asarray(x, "bfloat16"))
    assert (coarse.integers.dtype, coarse.scale.dtype) == ("int8", "bfloat16")
    assert np.isnan(Int8Rows.of(jnp.asarray([[1.0, np.nan]])).scale).all()  # not hidden


def test_the_mask_counts_absolute_positions():
    """A chunk of the queries sees what it would see among all of them."""
    everything = np.arange(40)
    mask = jax.jit(partial(attention_mask, window=5, num_meta_tokens=3))
    whole = np.asarray(mask(everything[None], everything))
    chunk = mask(everything[None, 30:], everything[:35])
    np.testing.assert_array_equal(chunk, whole[:, 30:, :35])
    assert whole[0, 30].nonzero()[0].tolist() == [0, 1, 2, *range(25, 31)]


@pytest.mark.parametrize("implementation", [None, *FUNCTIONS])
def test_one_call_chooses(implementation):
    query, key, value, meta_key, meta_value, _ = inputs(7, 9)
    kv_start = [3, 1]
    chosen = jax.jit(partial(attention, window=3, implementation=implementation))
    actual = chosen(
        *cast([query, key, value]),
        **dict(zip(("meta_key", "meta_value"), cast([meta_key, meta_value]), strict=True)),
        kv_start=jnp.asarray(kv_start),
    )
    expected = by_hand(query, key, value, meta_key, meta_value, 3, kv_start)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=2e-6)
    without = chosen(*cast([query, key, value]))
    expected = by_hand(query, key, value, meta_key[:0], meta_value[:0], 3)
    np.testing.assert_allclose(without, expected, rtol=0, atol=2e-6)


def test_an_unknown_implementation_is_refused():
    arrays = cast(inputs(3)[:3])
    with pytest.raises(
        ValueError,
        match="no attention 'fastest'; there are blocks, cudnn, pallas_gpu, pallas_tpu, reference",
    ):
        attention(*arrays, window=None, implementation="fastest")
