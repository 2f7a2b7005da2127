"""What the pictures of analyses show: the numbers that they are given."""

import jax.numpy as jnp
import numpy as np
import pytest

from hymba_jax.analysis.attention_mass import AttentionMass
from hymba_jax.analysis.figures import (
    draw_attention_mass,
    draw_betas,
    draw_cache,
    draw_importance,
    draw_maps,
    draw_receptive_field,
)
from hymba_jax.analysis.receptive_field import ReceptiveField
from hymba_jax.config import PRESETS

Figure = pytest.importorskip("matplotlib.figure", reason="extra plots").Figure


def random_mass(layers, heads):
    mass = np.random.default_rng(0).dirichlet(np.ones(4), (layers, heads))
    return AttentionMass(mass, np.ones((layers, heads)))


@pytest.mark.parametrize(("layers", "heads"), [(3, 4), (32, 25)])
def test_bars_of_attention_are_stacked_to_one(layers, heads):
    """One per head, or of too many heads one per layer."""
    mass = random_mass(layers, heads)
    axis = Figure().subplots()
    draw_attention_mass(axis, mass)
    heights = np.array([[bar.get_height() for bar in bars] for bars in axis.containers])
    drawn = mass.mass if layers * heads <= 64 else mass.mass.mean(1, keepdims=True)
    np.testing.assert_allclose(heights.T, drawn.reshape(-1, 4))
    tops = [bar.get_y() + bar.get_height() for bar in axis.containers[-1]]
    np.testing.assert_allclose(tops, 1)
    layer = [round(bar.get_x() + bar.get_width() / 2) for bar in axis.containers[0]]
    assert layer == sorted([*range(layers)] * drawn.shape[1])


def test_importance_is_the_change():
    without = np.array([[3.0, 2.5], [np.nan, np.nan], [2.0, 1.5]])
    axis = Figure().subplots()
    draw_importance(axis, 2.0, without, "loss")
    heights = [[bar.get_height() for bar in bars] for bars in axis.containers]
    np.testing.assert_array_equal(heights, (without - 2.0).T)
    labels = axis.get_legend_handles_labels()[1]
    assert labels == ["without attention heads", "without SSM heads"]


@pytest.mark.parametrize("hybrid", [[], [1], [0, 2]])
def test_betas_are_those_of_hybrid_layers(hybrid):
    """Their medians; in other layers, which may be all, nothing is drawn."""
    values = np.random.default_rng(0).normal(size=(3, 2, 16))
    figure = Figure()
    axis = figure.subplots()
    draw_betas(axis, [beta if layer in hybrid else None for layer, beta in enumerate(values)])
    for side, bars in enumerate(axis.containers):
        x, y = bars.lines[0].get_data()
        drawn = np.isfinite(y)
        assert np.round(x[drawn]).tolist() == hybrid
        np.testing.assert_allclose(y[drawn], np.median(np.abs(values[hybrid, side]), axis=-1))
    figure.canvas.draw()


def test_maps_have_rows_of_one_sum():
    rng = np.random.default_rng(0)
    attention = np.tril(rng.random((2, 6, 6)))
    attention /= attention.sum(-1, keepdims=True)
    ssm = np.tril(7 * rng.random((6, 6)))
    axes = Figure().subplots(1, 3)
    draw_maps(axes, jnp.asarray(attention), jnp.asarray(ssm), 2)
    drawn = [np.asarray(axis.images[0].get_array()) ** 2 for axis in axes]
    for each in drawn:
        np.testing.assert_allclose(each.sum(-1), 1, rtol=1e-5)
    np.testing.assert_allclose(drawn[0], attention.mean(0), rtol=1e-5)
    np.testing.assert_allclose(drawn[2], (drawn[0] + drawn[1]) / 2, rtol=1e-5)


def test_the_receptive_field_is_drawn_backwards():
    fields = [ReceptiveField(np.array([1.0, 2.0, 5.0]), distance) for distance in (1.0, 2.0)]
    axis = Figure().subplots()
    draw_receptive_field(axis, fields)
    x, y = axis.lines[0].get_data()
    assert dict(zip(x.tolist(), y.tolist(), strict=True)) == {0: 0.625, 1: 0.25, 2: 0.125}
    assert axis.lines[1].get_xdata() == [1.5, 1.5]


def test_the_cache_is_that_of_the_paper():
    """Hymba-1.5B: 3 global layers of 8192 tokens, 5 heads of 64 and 128 channels, 16 bits."""
    axis = Figure().subplots()
    draw_cache(axis, PRESETS["hymba-1.5b"], "bfloat16")
    tops = [area.get_paths()[0].vertices[:, 1].max() for area in axis.collections]
    labels = axis.get_legend_handles_labels()[1]
    sizes = dict(zip(labels, np.diff([0, *tops]), strict=True))
    assert sizes["global KV"] == pytest.approx(3 * 8192 * 5 * (64 + 128) * 2 / 1e6)
    assert sizes["window KV"] == pytest.approx(14 * 1024 * 5 * (64 + 128) * 2 / 1e6)
