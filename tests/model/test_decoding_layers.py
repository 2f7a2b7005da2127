"""Decoding by the kernels of a layer's position, in Pallas's interpreter, against the layers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from interpreter import interpret_kernels
from random_weights import random_weights
from slow import slow_but

from hymba_jax.config import AttentionConfig, HymbaConfig, SSMConfig
from hymba_jax.model import fuse_projections
from hymba_jax.model.quantized import quantize_kernels

ROWS, PROMPT, STEPS = 3, 9, 4
CONFIG = HymbaConfig(
    vocab_size=64,
    hidden_size=64,
    mlp_size=96,
    layers="G Ww",
    attention=AttentionConfig(num_heads=2, num_kv_heads=1, window=6, rope_type="default"),
    ssm=SSMConfig(state_size=16, dt_rank=5),
    num_meta_tokens=3,
    norm_eps=0.01,  # which the tests can see
)
# Of other proportions than the released ones.
TWO_KV_HEADS = AttentionConfig(
    num_heads=4, num_kv_heads=2, head_dim=32, value_dim=32, window=6, rope_type="default"
)
TOKENS = np.random.default_rng(0).integers(3, 64, (ROWS, PROMPT + STEPS))
LENGTHS = jnp.asarray([PROMPT, 2, PROMPT - 1])  # of the rows' prompts


@pytest.fixture
def kernels(monkeypatch):
    """What GPUs run; the names of those that were called."""

    def start():
        jax.clear_caches()  # of what was traced for CPUs
        monkeypatch.setattr("hymba_jax.ops.layer_step.sizes.target_platform", lambda: "gpu")
        return interpret_kernels(monkeypatch)

    yield start
    jax.clear_caches()


def make_model(config=CONFIG, *, dtype="bfloat16", int8=False):
    """With the same numbers in every dtype."""
    _, params = random_weights(config, param_dtype="bfloat16", scan_layers=False)
    compute = {"dtype": dtype, "param_dtype": dtype, "scan_layers": False}
    graph, like = random_weights(config, **compute)
    params = jax.tree.map(lambda a, b: a.astype(b.dtype), params, like)
    model = fuse_projections(nnx.merge(graph, params))
    return quantize_kernels(model) if int8 else model


def decode(model, kv_cache="float", rows=ROWS):
    """Logits of single tokens after the prompts, the second row's being padding in the last step,
    and the state after them."""
    graph, params = nnx.split(model)
    extend = jax.jit(
        lambda params, *args, **kwargs: nnx.merge(graph, params).extend(*args, **kwargs),
        static_argnames="is_start",
    )
    meta = jax.jit(lambda params: nnx.merge(graph, params).meta_state())(params)
    state = model.init_state(rows, 32, kv_cache=kv_cache).initialize(meta)
    prompts = jnp.asarray(TOKENS[:rows, :PROMPT])
    _, state = extend(params, prompts, state, meta, LENGTHS[:rows], is_start=True)
    logits = []
    for step in range(STEPS):
        lengths = jnp.ones(rows, jnp.int32).at[1:2].set(step < STEPS - 1)
        tokens = jnp.asarray(TOKENS[:rows, PROMPT + step : PROMPT + step + 1])
        x, state = extend(params, tokens, state, meta, lengths)
        logits.append(np.where(lengths[:, None] > 0, model.logits(x)[:, 0], 0))
    return np.stack(logits), state


@pytest.mark.parametrize(
    ("changes", "int8", "kv_cache", "rows"),
    slow_but(
        [
            ({}, False, "float", ROWS),
            ({}, False, "float", 1),
            ({}, True, "int8", ROWS),
            ({"num_meta_tokens": 0}, False, "float", ROWS),
            ({"layers": "W- Ww"}, False, "float", ROWS),
            ({"attention": TWO_KV_HEADS}, False, "float", ROWS),
        ],
        ({"attention": TWO_KV_HEADS}, False, "float", ROWS),
    ),
)
def test_steps_equal_the_layers(kernels, changes, int8, kv_cache, rows):
    """As far from the numbers of float32 as the layers in bfloat16 are; past the window, with
    a row that gets padding."""
    config = dataclasses.replace(CONFIG, **changes)
    exact, _ = decode(make_model(config, dtype="float32", int8=int8), kv_cache, rows)
    model = make_model(config, int8=int8)
    expected, before = decode(model, kv_cache, rows)
    called = kernels()
    actual, after = decode(model, kv_cache, rows)
    names = ("project_heads", "attention_step", "convolve_and_project", "finish_heads")
    assert set(called) >= {*names, "project_residual", "project_gated"}
    error, bound = (np.abs(logits - exact).max() for logits in (actual, expected))
    assert error <= 1.5 * bound
    assert np.abs(actual - expected).max() <= 2 * bound < 0.1 * np.ptp(exact)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(
            np.float32(a), np.float32(b), rtol=0, atol=0.1 * np.abs(np.float32(b)).max()
        ),
        after,
        before,
    )


@pytest.mark.parametrize(
    ("changes", "dtype", "rows", "is_taken"),
    [
        ({}, "bfloat16", 128, True),
        ({}, "bfloat16", 129, False),
        ({}, "float32", 1, False),
        ({"mlp_activation": "relu2"}, "bfloat16", 1, False),
        ({"fusion": "concat"}, "bfloat16", 1, False),
        ({"layers": "S A M"}, "bfloat16", 1, False),
        ({"attention": dataclasses.replace(CONFIG.attention, qk_norm="rms")}, "bfloat16", 1, False),
    ],
)
def test_other_layers_are_those_of_XLA(kernels, changes, dtype, rows, is_taken):
    model = make_model(dataclasses.replace(CONFIG, **changes), dtype=dtype)
    called = kernels()

    def step():
        state = model.init_state(rows, 32).initialize(model.meta_state())
        ones = jnp.ones(rows, jnp.int32)
        return model.extend(ones[:, None], state, model.meta_state(), ones)

    jax.eval_shape(step)
    assert bool(called) == is_taken
