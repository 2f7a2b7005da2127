"""Sequences in chunks against the full forward pass over all of them.

Every sequence is several windows long, so that each ring of keys and values wraps more than once.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from golden_cases import CASES, load
from hypothesis import given, settings
from hypothesis import strategies as st
from random_weights import random_weights
from slow import slow_but

from hymba_jax.config import PRESETS, AttentionConfig, ComputeConfig, HymbaConfig, SSMConfig
from hymba_jax.model import Hymba
from hymba_jax.model.attention import Attention
from hymba_jax.model.hymba import unstack_layers
from hymba_jax.model.kv_cache import KeyValue

ROWS, LENGTH = 3, 48
WIDTHS = (1, 16)  # of a chunk with its padding: a step, and more than a window
# Of the logits' range. The HF implementation's own float32 and float64 runs are 3e-6 of it apart,
# and the same sums in another order a few times that; a key too many or few moves them by a tenth.
BOUND = 1e-4

# These programs take longer to compile than to run.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

SMALL = HymbaConfig(
    vocab_size=61,
    hidden_size=16,
    mlp_size=24,
    layers="G Ww",
    attention=AttentionConfig(num_heads=4, num_kv_heads=2, window=5, rope_type="default"),
    ssm=SSMConfig(state_size=4),
    num_meta_tokens=3,
    max_positions=64,
)


def changed(attention=None, ssm=None, **values):
    return dataclasses.replace(
        SMALL,
        attention=dataclasses.replace(SMALL.attention, **attention or {}),
        ssm=dataclasses.replace(SMALL.ssm, **ssm or {}),
        **values,
    )


CONFIGS = {
    "most kinds of layers, no meta tokens": changed(
        {"qk_norm": "rms"}, layers="Ll M A Gg", num_meta_tokens=0
    ),
    "every kind of layer, no meta tokens": changed(
        {"qk_norm": "rms"}, layers="Ll M Aa Gg W", num_meta_tokens=0
    ),
    "more meta tokens than the window": changed(layers="G W", num_meta_tokens=9, fusion="concat"),
    "untied head, a kernel of 1": changed(
        {"qk_norm": "perhead-rms"}, {"conv_kernel": 1}, tie_embeddings=False, mlp_activation="relu2"
    ),
    "Mamba2": changed({}, {"head_dim": 4, "groups": 2}, layers="S- L-"),
    "layers with and without an MLP": changed({}, {"head_dim": 4}, layers="S A-M W-w S-"),
    "a kernel longer than the window": changed({"window": 2}, {"conv_kernel": 7}, layers="W Ll"),
    # The longest row ends in padding that stands where the base would change.
    "window longer than the sequence, dynamic base": changed(
        {"window": 100, "rope_type": "dynamic_ntk", "rope_original_positions": LENGTH + 3},
        layers="Ww L",
    ),
}

QUICK = (
    "more meta tokens than the window",
    "most kinds of layers, no meta tokens",
    "Mamba2",
)


def init_state(config, batch, context, dtype, state_dtype):
    """A state of zeros, of a model that computes in `dtype`."""
    compute = ComputeConfig(dtype=dtype, scan_layers=False)
    model = nnx.eval_shape(lambda: Hymba(config, compute, nnx.Rngs(0)))
    return model.init_state(batch, context, state_dtype)


class Prefiller:
    """A model that prefills sequences in chunks, and their logits by the full forward."""

    def __init__(self, name):
        if name in CASES:
            golden = load(name)
            self.config = golden.config
            graph, self.params = golden.model(scan_layers=False)
        else:
            self.config = CONFIGS[name]
            graph, self.params = random_weights(self.config, scan_layers=False)
        rng = np.random.default_rng(2)
        self.tokens = rng.integers(0, self.config.vocab_size, (ROWS, LENGTH)).astype(np.int32)

        @functools.partial(jit, static_argnames="is_start")
        def extend(params, chunk, state, meta, lengths, is_start):
            model = nnx.merge(graph, params)
            x, state = model.extend(chunk, state, meta, lengths, is_start=is_start)
            return model.logits(x), state

        self.graph, self.extend = graph, extend
        self.forward = jit(lambda params, tokens: nnx.merge(graph, params)(tokens))
        self.full = np.asarray(self.forward(self.params, self.tokens))
        self.meta = jit(lambda params: nnx.merge(graph, params).meta_state())(self.params)

    def start(self, dtype="float32", state_dtype="float32"):
        return init_state(self.config, ROWS, LENGTH, dtype, state_dtype).initialize(self.meta)

    def prefill(self, chunking, cache=None, padding=0):
        """Logits of the whole sequences and the cache after them, in chunks of at most these
        lengths a row, and single tokens for what they leave. Only the first chunk is told that
        nothing is in the cache, and a single token not even then."""
        cache = cache or self.start()
        logits = np.full_like(self.full, np.nan)
        at, chunking = np.zeros(ROWS, np.int32), iter(chunking)
        is_start = True
        while (at < LENGTH).any():
            lengths = np.minimum(next(chunking, [1] * ROWS), LENGTH - at).astype(np.int32)
            width = next(width for width in WIDTHS if width >= lengths.max())
            chunk = np.full((ROWS, width), padding, np.int32)
            for row, start, length in zip(range(ROWS), at, lengths, strict=True):
                chunk[row, :length] = self.tokens[row, start : start + length]
            new, cache = self.extend(
                self.params, chunk, cache, self.meta, lengths, is_start=is_start and width > 1
            )
            is_start = False
            for row, start, length in zip(range(ROWS), at, lengths, strict=True):
                logits[row, start : start + length] = new[row, :length]
            at += lengths
        return logits, cache


@functools.cache
def prefiller_of(name):
    return Prefiller(name)


# Chunks of a row: nothing, a token, less than the kernel of the convolution, more than the window.
chunk_lengths = st.lists(
    st.one_of(st.sampled_from([0, 1, 2, 3, 16]), st.integers(0, 16)), min_size=ROWS, max_size=ROWS
)
steps = st.just([1] * ROWS)
chunkings = st.lists(st.one_of(chunk_lengths, chunk_lengths, steps), min_size=3, max_size=12)


@pytest.mark.parametrize("name", slow_but([*CASES, *CONFIGS], *QUICK))
@settings(derandomize=True, deadline=None, max_examples=5, database=None)
@given(chunking=chunkings)
def test_any_chunking_equals_the_full_forward(name, chunking):
    prefiller = prefiller_of(name)
    logits, cache = prefiller.prefill(chunking)
    error = np.abs(logits - prefiller.full).max() / np.ptp(prefiller.full)
    assert error <= BOUND  # a NaN is not
    np.testing.assert_array_equal(cache.lengths, LENGTH)


CHUNKING = [(16, 9, 0), (0, 1, 1), (3, 0, 16), (1, 1, 1), (16, 16, 2)]


@pytest.mark.parametrize("name", slow_but(["tiny-ntk", *QUICK], *QUICK))
def test_padding_does_not_affect_outputs_or_state(name):
    """To the last bit, in the outputs and in their state."""
    first, second = (prefiller_of(name).prefill(CHUNKING, padding=token) for token in (0, 7))
    jax.tree.map(np.testing.assert_array_equal, first, second)


def test_a_row_without_tokens_stays_as_it_is():
    prefiller = prefiller_of("more meta tokens than the window")
    _, before = prefiller.prefill(CHUNKING)
    for width in WIDTHS:
        _, after = prefiller.extend(
            prefiller.params,
            np.ones((ROWS, width), np.int32),
            before,
            prefiller.meta,
            np.array([0, 1, 0], np.int32),
            is_start=False,
        )
        for actual, expected in zip(jax.tree.leaves(after), jax.tree.leaves(before), strict=True):
            np.testing.assert_array_equal(actual[::2], expected[::2])
            assert (actual[1] != expected[1]).any()


@pytest.mark.parametrize("name", slow_but(QUICK, "Mamba2"))
def test_rejected_tokens_leave_no_trace(name):
    """The state is that after the accepted ones alone, and each output that of `extend`."""
    prefiller = prefiller_of(name)
    graph = nnx.split(Hymba.abstract(prefiller.config, ComputeConfig(scan_layers=False)))[0]

    @jit
    def verify(params, chunk, state, meta, lengths, accepted):
        model = nnx.merge(graph, params)
        return model.verify(chunk, state, meta, lengths, lambda x: (model.logits(x), accepted))

    _, before = prefiller.prefill([(16, 9, 3), (16, 16, 16)])
    before = before._replace(lengths=np.minimum(before.lengths, LENGTH - 16))
    chunk, lengths = prefiller.tokens[:, -16:], np.array([16, 9, 16], np.int32)
    accepted = np.array([4, 9, 1], np.int32)
    inputs = (prefiller.params, chunk, before, prefiller.meta)
    logits, state = verify(*inputs, lengths, accepted)
    of_all, _ = prefiller.extend(*inputs, lengths, is_start=False)
    _, expected = prefiller.extend(*inputs, accepted, is_start=False)
    scale = np.ptp(prefiller.full)
    for row, length in enumerate(lengths):
        assert np.abs(logits[row, :length] - of_all[row, :length]).max() <= BOUND * scale
    np.testing.assert_array_equal(state.lengths, expected.lengths)
    for actual, wanted in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True):
        assert np.abs(actual - wanted).max() <= BOUND * max(np.ptp(wanted), 1)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16"])
def test_kept_in_the_dtypes_asked_for(width, dtype, state_dtype):
    prefiller = prefiller_of("more meta tokens than the window")
    before = prefiller.start(dtype, state_dtype)
    chunk, lengths = np.ones((ROWS, width), np.int32), np.ones(ROWS, np.int32)
    _, cache = prefiller.extend.eval_shape(
        prefiller.params, chunk, before, prefiller.meta, lengths, is_start=False
    )
    assert jax.tree.structure(cache) == jax.tree.structure(before)
    for layer in cache.layers:
        assert layer.ssm.ssm_state.dtype == state_dtype
        assert layer.ssm.conv_state.dtype == dtype
        assert layer.kv is None or layer.kv.key.dtype == layer.kv.value.dtype == dtype


def test_bfloat16_state_is_accurate():
    """A state in bfloat16 moves the logits by no more than weights in bfloat16 do, as a root mean
    square. A state that were not carried on would move them by as much as they are."""
    prefiller = prefiller_of("more meta tokens than the window")
    logits, _ = prefiller.prefill(CHUNKING, prefiller.start("bfloat16", "bfloat16"))
    rounded = jax.tree.map(lambda a: a.astype("bfloat16").astype(a.dtype), prefiller.params)
    by_weights = np.asarray(prefiller.forward(rounded, prefiller.tokens)) - prefiller.full
    error, bound = (np.sqrt(np.mean(e**2)) for e in (logits - prefiller.full, by_weights))
    assert 0 < error <= bound < np.std(prefiller.full) / 10


class RoundedAttention(Attention):
    """With keys and values of tokens rounded to 254 steps between the largest and its negative."""

    def key_value(self, x, rope):
        kv = super().key_value(x, rope)
        if len(x) == 1:  # meta tokens, whose cache has floats
            return kv
        steps = (jnp.abs(a).max(-1, keepdims=True) / 127 for a in kv)
        return KeyValue(*(jnp.round(a / step) * step for a, step in zip(kv, steps, strict=True)))


def test_a_cache_of_8_bits_is_the_full_forward_with_rounded_keys_and_values():
    """Whatever the chunks. A value halfway between two integers may be rounded to either, which
    moves the logits by less than a tenth of what the rounding of all does."""
    prefiller = prefiller_of("more meta tokens than the window")
    compute = ComputeConfig(scan_layers=False)
    model = nnx.eval_shape(lambda: Hymba(prefiller.config, compute, nnx.Rngs(0)))
    empty = model.init_state(ROWS, LENGTH, kv_cache="int8").initialize(prefiller.meta)
    logits, cache = prefiller.prefill(CHUNKING, empty)
    assert {str(a.dtype) for layer in cache.layers for a in jax.tree.leaves(layer.kv)} == {
        "float32",
        "int8",
    }
    model = nnx.merge(prefiller.graph, prefiller.params)
    for block in model.blocks():
        block.mixer.attention.__class__ = RoundedAttention
    expected = np.asarray(jit(lambda tokens: model(tokens))(prefiller.tokens))
    moved = np.abs(expected - prefiller.full).max()
    assert 0 < np.abs(logits - expected).max() <= moved / 10
    assert moved <= np.ptp(prefiller.full) / 20


def state_shapes(config, batch, context, dtype="bfloat16"):
    return jax.eval_shape(lambda: init_state(config, batch, context, dtype, dtype))


@pytest.mark.parametrize(("context", "ring"), [(4, 4), (5, 5), (48, 5)])
def test_cache_slots_per_layer(context, ring):
    config = changed(layers="Gg Ww M A Ll", ssm={"conv_kernel": 3})
    layers = state_shapes(config, 2, context).layers
    slots = [layer.kv and (layer.kv.key.shape[2], layer.kv.value.shape[2]) for layer in layers]
    everything, window = (context, context), (ring, ring)
    assert slots == [everything, None, window, None, None, everything, window, None]
    assert [layer.ssm is None for layer in layers] == [False] * 5 + [True] * 3
    assert layers[0].kv.key.shape == (2, 2, context, 4)
    assert layers[0].kv.value.shape == (2, 2, context, 8)
    assert layers[0].ssm.conv_state.shape == (2, 2, 32)
    assert layers[0].ssm.ssm_state.shape == (2, 4, 32)


def test_cache_size_of_the_1_5b():
    """78.6 MB at 8192 tokens, in two bytes a value (SSM state and inputs are 3.9 of them)."""
    cache = state_shapes(PRESETS["hymba-1.5b"], 1, 8192)
    attention = (3 * 8192 + 14 * 1024) * 5 * (64 + 128)
    ssm = 32 * 3200 * (16 + 3)
    assert 2 * (attention + ssm) == 78_602_240
    assert sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(cache.layers)) == 78_602_240
    assert sum(layer.kv is not None for layer in cache.layers) == 17


def test_meta_tokens_are_kept_once_for_any_batch():
    prefiller = prefiller_of("more meta tokens than the window")
    for layer, spec in zip(prefiller.meta, prefiller.config.layer_specs, strict=True):
        assert (layer.kv is None) == spec.reuses_kv
        assert layer.ssm.ssm_state.shape[0] == 1
        if layer.kv is not None:
            assert layer.kv.key.shape[:3] == (1, 2, prefiller.config.num_meta_tokens)


def test_unrolled_layers_are_the_stacked_ones():
    config = changed(layers="M 2*W")
    stacked = nnx.merge(*random_weights(config))
    unrolled = unstack_layers(stacked)
    assert len(stacked.groups) == 2
    assert len(unrolled.groups) == 3
    np.testing.assert_array_equal(
        unrolled.groups[2].blocks[0].mlp.down_proj.kernel[...],
        stacked.groups[1].group.blocks[0].mlp.down_proj.kernel[1],
    )
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, config.vocab_size, (1, 20)))
    actual, expected = (
        jit(lambda params, graph=graph: nnx.merge(graph, params)(tokens))(params)
        for graph, params in map(nnx.split, (unrolled, stacked))
    )
    # The same sums, compiled apart.
    np.testing.assert_allclose(actual, expected, rtol=0, atol=BOUND / 10 * np.ptp(expected))


def test_stacked_layers_keep_no_state():
    config = changed(layers="2*W")
    model = Hymba.abstract(config, ComputeConfig(scan_layers=True))
    for use in (Hymba.meta_state, lambda model: model.init_state(1, 8)):
        with pytest.raises(ValueError, match="a model with scan_layers has no state"):
            nnx.eval_shape(use, model)
