"""Analyses against their definitions, written as loops over numpy arrays in float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from inference.models import make_model

from hymba_jax.analysis.attention_mass import attention_mass
from hymba_jax.analysis.importance import head_importance
from hymba_jax.analysis.layer_inputs import over_layers
from hymba_jax.analysis.magnitudes import beta_vectors, output_magnitudes
from hymba_jax.analysis.maps import attention_maps, ssm_maps
from hymba_jax.analysis.receptive_field import receptive_field
from hymba_jax.config import ComputeConfig, SSMConfig
from hymba_jax.model import Hymba, stack_layers
from hymba_jax.model.block import LayerGroup
from hymba_jax.model.context import Context
from hymba_jax.model.rope import make_rope
from hymba_jax.ops.selective_scan.api import selective_scan

LENGTH, META = 21, 3
LAYERS = "Ww A S"  # the last two have attention heads alone, and Mamba2 heads alone
SSM = SSMConfig(state_size=4, head_dim=8)
# Of values of order 1, computed in float32.
TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def model():
    return make_model(layers=LAYERS, ssm=SSM)


@pytest.fixture(scope="module")
def tokens():
    return jnp.asarray(np.random.default_rng(0).integers(0, 256, (2, LENGTH)), jnp.int32)


@pytest.fixture(scope="module")
def layers(model, tokens):
    """Each layer's block, the input of its heads, and the rotation; meta tokens first."""
    positions = jnp.arange(META + LENGTH)[None]
    rope = make_rope(model.config, positions, META + LENGTH)
    *states, _ = model.hidden_states(tokens)
    return [
        (block, block.mixer_norm(x), rope) for block, x in zip(model.blocks(), states, strict=True)
    ]


def test_layers_are_computed_as_they_are_asked_for(model, tokens, monkeypatch):
    """The hidden states of all layers never exist at once."""
    groups, forward = [], LayerGroup.full_forward
    monkeypatch.setattr(
        LayerGroup, "full_forward", lambda *args: groups.append(args[0]) or forward(*args)
    )
    computed = [len(groups) for _ in over_layers(model, tokens, lambda mixer, inputs: None)]
    assert computed == [0, 1, 1, 2]  # Ww, of one group, A and S


@pytest.mark.parametrize("analysis", [attention_mass, output_magnitudes])
def test_padded_rows_whose_rotation_depends_on_their_length_are_refused(model, tokens, analysis):
    attention = dataclasses.replace(
        model.config.attention, rope_type="dynamic_ntk", rope_original_positions=LENGTH
    )
    dynamic = make_model(layers="W-", attention=attention)
    with pytest.raises(ValueError, match="rotation of 24 positions depends on the length of each"):
        analysis(dynamic, tokens, jnp.array([LENGTH, 5]))
    analysis(dynamic, tokens, jnp.array([LENGTH, LENGTH]))


class TestAttentionMass:
    def brute_force(self, layers, lengths):
        """Per layer and head: meta, BOS, self, cross, entropy, by a loop over all weights."""
        means, kv = [], None
        for block, x, rope in layers[:-1]:
            attention = block.mixer.attention
            kv = kv if attention.reuses_kv else attention.key_value(x, rope)
            maps = np.asarray(attention.weights(x, rope, kv), np.float64)
            sums = np.zeros((maps.shape[1], 5))
            for row, length in enumerate(lengths):
                for head in range(maps.shape[1]):
                    for query in range(META, META + length):
                        for key, weight in enumerate(maps[row, head, query, : query + 1]):
                            if key < META:
                                kind = 0
                            elif key == META:
                                kind = 1
                            else:
                                kind = 2 if key == query else 3
                            sums[head, kind] += weight
                            sums[head, 4] -= weight * np.log(weight) if weight else 0.0
            means.append(sums / sum(lengths))
        return np.stack(means)

    @pytest.mark.parametrize("lengths", [[LENGTH, LENGTH], [LENGTH, 5]])
    def test_it_equals_the_definition(self, model, tokens, layers, lengths, monkeypatch):
        """Some queries at a time, of which the last ones are fewer."""
        monkeypatch.setattr("hymba_jax.analysis.attention_mass._QUERIES", 8)
        actual = attention_mass(model, tokens, jnp.asarray(lengths))
        expected = self.brute_force(layers, lengths)
        np.testing.assert_allclose(actual.mass[:3], expected[..., :4], atol=TOLERANCE)
        np.testing.assert_allclose(actual.entropy[:3], expected[..., 4], atol=10 * TOLERANCE)
        assert np.isnan(actual.mass[3]).all()


def test_attention_maps_have_the_mass(model, tokens):
    """Which the other function sums some queries at a time."""
    maps = [*attention_maps(model, tokens)]
    assert [each is None for each in maps] == [False, False, False, True]
    for each in maps[:3]:
        assert each.shape == (2, 2, META + LENGTH, META + LENGTH)
        np.testing.assert_allclose(each.sum(-1), 1.0, atol=TOLERANCE)
    mass = attention_mass(model, tokens).mass
    meta = np.stack([each[:, :, META:, :META].sum(-1).mean((0, 2)) for each in maps[:3]])
    np.testing.assert_allclose(mass[:3, :, 0], meta, atol=TOLERANCE)


class TestMagnitudes:
    def test_they_equal_the_definition(self, model, tokens, layers):
        """Of all tokens of the first row, and the first 5 of the second."""
        actual, kv = output_magnitudes(model, tokens, jnp.array([LENGTH, 5])), None
        for i, (block, x, rope) in enumerate(layers[:2]):
            mixer, attention = block.mixer, block.mixer.attention
            kv = kv if attention.reuses_kv else attention.key_value(x, rope)
            maps = np.asarray(attention.weights(x, rope, kv), np.float64)
            values = np.repeat(kv.value, attention.num_heads // attention.num_kv_heads, axis=2)
            attended = np.einsum("bhqk,bkhv->bqhv", maps, values)
            ssm = np.asarray(mixer.ssm(x, Context(rope), None)[0], np.float64)
            for side, y, norm in ((0, attended, mixer.attention_norm), (1, ssm, mixer.ssm_norm)):
                y = y.reshape(2, META + LENGTH, -1)[:, META:]
                y = np.concatenate([y[0], y[1, :5]])
                rms = np.sqrt((y**2).mean(-1, keepdims=True) + norm.eps)
                after = np.abs(y / rms * np.asarray(norm.scale[...])).mean()
                np.testing.assert_allclose(actual.before[i, side], np.abs(y).mean(), rtol=1e-4)
                np.testing.assert_allclose(actual.after[i, side], after, rtol=1e-4)
        assert np.isnan(actual.before[2:]).all()

    def test_sums_in_bfloat16_models_are_float32(self, model, tokens):
        """That of two rows is the mean of those of each, which differ in what is padding alone."""
        config = dataclasses.replace(model.config, layers="W-")
        model = Hymba(config, ComputeConfig(dtype="bfloat16", scan_layers=False), nnx.Rngs(0))
        lengths = jnp.array([[LENGTH, LENGTH], [LENGTH, 0], [0, LENGTH]])
        both, *each = (np.stack(output_magnitudes(model, tokens, rows)) for rows in lengths)
        np.testing.assert_allclose(both, np.mean(each, axis=0), rtol=1e-6)

    def test_beta_vectors(self, model):
        betas = beta_vectors(stack_layers(model))
        assert betas[2:] == [None, None]
        mixer = model.blocks()[1].mixer
        np.testing.assert_array_equal(betas[1][0], mixer.attention_norm.scale[...])
        np.testing.assert_array_equal(betas[1][1], mixer.ssm_norm.scale[...])


def test_importance_is_the_evaluation_without_a_side(model, tokens):
    """Where a norm's output is zero, the other side alone is what the projection gets."""

    def evaluate(model):
        return float(jnp.square(model.last_hidden_state(tokens)).sum())

    before = nnx.to_pure_dict(nnx.state(model))
    whole, without = head_importance(model, evaluate)
    assert whole == evaluate(model)
    assert np.isnan(without[2:]).all()
    for side, name in enumerate(("attention_norm", "ssm_norm")):
        changed = make_model(layers=LAYERS, ssm=SSM)
        norm = getattr(changed.blocks()[1].mixer, name)
        norm.scale[...] = jnp.zeros_like(norm.scale[...])
        np.testing.assert_allclose(without[1, side], evaluate(changed), rtol=1e-5)
    assert len({whole, *without[:2].flatten().tolist()}) == 5
    jax.tree.map(np.testing.assert_array_equal, before, nnx.to_pure_dict(nnx.state(model)))


class TestSSMMaps:
    def alpha(self, ssm, scan, row):
        """alpha[channel, t, s], by a loop over the formula."""
        dt = np.log1p(np.exp(np.asarray(scan.dt[row], np.float64) + np.asarray(ssm.dt_bias[...])))
        B, C = (np.asarray(a[row], np.float64) for a in (scan.B, scan.C))
        A = -np.exp(np.asarray(ssm.A_log[...], np.float64))  # (state, channels)
        length, channels = dt.shape
        alpha = np.zeros((channels, length, length))
        for t in range(length):
            for s in range(t + 1):
                decay = np.exp(A * dt[s + 1 : t + 1].sum(0))
                alpha[:, t, s] = (C[t] * B[s]) @ decay * dt[s]
        return alpha

    def test_they_equal_the_formula(self, model, tokens, layers, monkeypatch):
        monkeypatch.setattr("hymba_jax.analysis.maps._ROWS", 16)
        maps = [*ssm_maps(model, tokens)]
        assert maps[2:] == [None, None]
        for (block, x, rope), actual in zip(layers[:2], maps, strict=False):
            scan = block.mixer.ssm.scan_inputs(x, Context(rope), None)
            for row in range(2):
                expected = np.abs(self.alpha(block.mixer.ssm, scan, row)).sum(0)
                np.testing.assert_allclose(actual[row], expected, rtol=1e-3, atol=1e-4)

    def test_the_formula_is_the_scan(self, layers):
        """Times u, alpha is what the scan computes, but for D and the gate."""
        block, x, rope = layers[0]
        ssm = block.mixer.ssm
        scan = ssm.scan_inputs(x, Context(rope), None)
        y, _ = selective_scan(
            scan.u,
            scan.dt,
            -jnp.exp(ssm.A_log[...]),
            scan.B,
            scan.C,
            jnp.zeros_like(ssm.D[...]),
            dt_bias=ssm.dt_bias[...],
        )
        expected = np.einsum("cts,sc->tc", self.alpha(ssm, scan, 0), scan.u[0])
        np.testing.assert_allclose(y[0], expected, rtol=1e-3, atol=1e-4)


def test_receptive_field_equals_the_jacobian(tokens):
    """Of the last output by each embedding, as JAX computes it at once."""
    model = make_model(layers="W")

    def output(rows):
        copy = nnx.merge(*nnx.split(model))
        copy.embed = lambda _: rows[None]
        return copy.last_hidden_state(tokens[:1])[0, -1]

    jacobian = jax.jit(jax.jacrev(output))(model.embed(tokens[:1])[0])
    jacobian = np.asarray(jacobian, np.float64)
    strength = np.sqrt((jacobian**2).sum((0, 2)))
    actual = receptive_field(model, tokens[0])
    np.testing.assert_allclose(actual.strength, strength, rtol=1e-3)
    distance = sum(strength[s] * (LENGTH - 1 - s) for s in range(LENGTH)) / strength.sum()
    assert actual.distance == pytest.approx(distance, rel=1e-3)
