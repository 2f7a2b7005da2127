"""The modules of a model against numpy in float64, and what they start from."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hymba_jax.config import PRESETS, AttentionConfig, ComputeConfig, HymbaConfig
from hymba_jax.config.layer_pattern import LayerSpec
from hymba_jax.model.context import Context
from hymba_jax.model.layers import RMSNorm
from hymba_jax.model.mixer import make_mixer
from hymba_jax.model.mlp import MLP
from hymba_jax.model.rope import make_rope
from hymba_jax.model.ssm import SSM
from hymba_jax.model.state import LayerState

CONFIG = HymbaConfig(
    vocab_size=50,
    hidden_size=32,
    mlp_size=48,
    layers="G Ww",
    attention=AttentionConfig(num_heads=4, num_kv_heads=2, window=4, rope_type="default"),
    num_meta_tokens=2,
)


def rng_array(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


@pytest.mark.parametrize(("shape", "x_shape"), [((6,), (2, 3, 6)), ((4, 6), (2, 3, 4, 6))])
def test_rms_norm(shape, x_shape):
    norm = RMSNorm(shape, ("any",) * len(shape), 1e-6, jnp.float32)
    scale, x = rng_array(*shape, seed=1), rng_array(*x_shape)
    norm.scale[...] = jnp.asarray(scale, jnp.float32)
    expected = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * scale
    np.testing.assert_allclose(norm(jnp.asarray(x, jnp.float32)), expected, rtol=1e-5, atol=1e-6)


def test_rms_norm_squares_in_float32():
    """300 ** 2 overflows nothing, but its sum over 4096 in bfloat16 would stick at 2**8 terms."""
    norm = RMSNorm((4096,), ("hidden",), 1e-6, jnp.float32)
    x = jnp.full((1, 4096), 300.0, jnp.bfloat16)
    np.testing.assert_array_equal(norm(x).astype(jnp.float32), 1.0)


@pytest.mark.parametrize(
    ("rope_type", "total", "theta"),
    [
        ("default", 9000, 10000.0),
        ("ntk", 50, 10000.0 * 7 ** (64 / 62)),  # 2 * 8192 / 2048 - 1
        ("dynamic_ntk", 2000, 10000.0),
        ("dynamic_ntk", 4096, 10000.0 * 3 ** (64 / 62)),  # 2 * 4096 / 2048 - 1
    ],
)
def test_rotation_in_complex_numbers(rope_type, total, theta):
    attention = dataclasses.replace(PRESETS["hymba-1.5b"].attention, rope_type=rope_type)
    config = dataclasses.replace(PRESETS["hymba-1.5b"], attention=attention)
    positions = np.asarray([0, 1, 17, 1000])
    x = rng_array(1, 4, 3, 64)
    rope = make_rope(config, jnp.asarray([positions]), total)
    angles = positions[:, None] * theta ** (-np.arange(32) / 32)
    turned = (x[..., :32] + 1j * x[..., 32:]) * np.exp(1j * angles)[None, :, None]
    expected = np.concatenate((turned.real, turned.imag), axis=-1)
    # At position 1000 a float32 angle is off by up to 1000 * 2**-24 = 6e-5 radians.
    np.testing.assert_allclose(rope.rotate(jnp.asarray(x, jnp.float32)), expected, atol=4e-4)


@pytest.mark.parametrize("activation", ["silu", "relu2"])
def test_mlp(activation):
    config = dataclasses.replace(CONFIG, mlp_activation=activation)
    mlp = MLP(config, ComputeConfig(), nnx.Rngs(0))
    x = rng_array(2, 3, 32)
    up = x @ np.asarray(mlp.up_proj.kernel[...], np.float64)
    if activation == "silu":
        gate = x @ np.asarray(mlp.gate_proj.kernel[...], np.float64)
        inner = gate / (1 + np.exp(-gate)) * up
    else:
        inner = np.maximum(up, 0) ** 2
    expected = inner @ np.asarray(mlp.down_proj.kernel[...], np.float64)
    np.testing.assert_allclose(mlp(jnp.asarray(x, jnp.float32)), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("qk_norm", ["none", "rms", "perhead-rms"])
def test_query_and_key_norms(qk_norm):
    """Normed heads have root mean square 1 before and, as rotation keeps lengths, after RoPE."""
    attention = dataclasses.replace(CONFIG.attention, qk_norm=qk_norm)
    config = dataclasses.replace(CONFIG, attention=attention)
    layer = make_mixer(
        config, LayerSpec("global", ssm="mamba"), ComputeConfig(), nnx.Rngs(0)
    ).attention
    x = jnp.asarray(rng_array(2, 5, 32), jnp.float32)
    rope = make_rope(config, jnp.arange(5)[None], 5)
    for heads in (layer.query(x, rope), layer.key_value(x, rope).key):
        rms = np.sqrt(np.mean(np.square(heads), axis=-1))
        assert np.allclose(rms, 1, atol=1e-3) == (qk_norm != "none")
    expected = {"none": None, "rms": (8,), "perhead-rms": (4, 8)}[qk_norm]
    assert getattr(getattr(layer.query_norm, "scale", None), "shape", None) == expected


@pytest.mark.parametrize("fusion", ["mean", "concat"])
def test_the_mixer_is_its_formula(fusion):
    config = dataclasses.replace(CONFIG, fusion=fusion)
    mixer = make_mixer(config, LayerSpec("window", ssm="mamba"), ComputeConfig(), nnx.Rngs(0))
    x = jnp.asarray(rng_array(2, 9, 32), jnp.float32)
    rope = make_rope(config, jnp.arange(9)[None], 9)
    context, meta = Context(rope), mixer.attention.init_state(1, 0, "float32", "float")
    attention, _ = mixer.attention(x, context, meta=meta)
    heads = [np.asarray(attention), np.asarray(mixer.ssm(x, context)[0])]
    normed = [a / np.sqrt(np.mean(np.square(a), -1, keepdims=True) + 1e-6) for a in heads]
    fused = sum(normed) / 2 if fusion == "mean" else np.concatenate(normed, axis=-1)
    output, kv, _ = mixer(x, context, LayerState(), meta, None)
    expected = fused @ np.asarray(mixer.out_proj.kernel[...])
    np.testing.assert_allclose(output, expected, rtol=1e-4, atol=1e-6)
    assert kv.new.key.shape == (2, 9, 2, 8)
    assert kv.new.value.shape == (2, 9, 2, 16)


def test_a_layer_that_reuses_keys_and_values_has_none_of_its_own():
    spec = LayerSpec("window", ssm="mamba", reuses_kv=True)
    mixer = make_mixer(CONFIG, spec, ComputeConfig(), nnx.Rngs(0))
    assert not hasattr(mixer.attention, "key_proj")
    x = jnp.asarray(rng_array(1, 4, 32), jnp.float32)
    with pytest.raises(ValueError, match="reuses keys and values, and was given none"):
        mixer(x, Context(make_rope(CONFIG, jnp.arange(4)[None], 4)), LayerState(), None, None)


class TestInitialisation:
    """Mamba, section 3.6, and normal(0.02) for linear maps."""

    ssm = staticmethod(lambda: SSM(PRESETS["hymba-125m"], ComputeConfig(), nnx.Rngs(0)))

    def test_decay_and_skip(self):
        ssm = self.ssm()
        for channel in (0, 500):
            np.testing.assert_allclose(np.exp(ssm.A_log[:, channel]), range(1, 17), rtol=1e-6)
        np.testing.assert_array_equal(ssm.D[...], 1)

    def test_time_step_is_log_uniform(self):
        """Mean and spread of 1024 draws, within 5 standard errors of the mean."""
        dt = np.log(jax.nn.softplus(self.ssm().dt_bias[...]))
        assert np.log(1e-3) - 1e-3 <= dt.min() <= dt.max() <= np.log(1e-1) + 1e-3
        width = np.log(100.0)
        standard_error = width / np.sqrt(12 * dt.size)
        assert abs(dt.mean() - np.log(1e-2)) < 5 * standard_error
        assert abs(dt.std() - width / np.sqrt(12)) < 5 * standard_error

    def test_time_step_projection(self):
        kernel = self.ssm().dt_proj.kernel[...]
        bound = 32**-0.5
        assert 0.99 * bound < np.abs(kernel).max() <= bound

    def test_linear_maps(self):
        kernel = self.ssm().in_proj.kernel[...]
        assert abs(np.std(kernel) - 0.02) < 5 * 0.02 / np.sqrt(2 * kernel.size)


def test_parameters_kept_in_float32():
    compute = ComputeConfig(dtype="bfloat16", param_dtype="bfloat16")
    params = nnx.state(SSM(CONFIG, compute, nnx.Rngs(0)), nnx.Param)
    kept = {
        ".".join(map(str, path))
        for path, leaf in nnx.to_flat_state(params)
        if leaf[...].dtype == jnp.float32
    }
    assert kept == {"A_log", "D", "dt_bias"}
