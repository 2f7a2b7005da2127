"""The table of names: complete, strict, and its own inverse."""

import json

import jax
import numpy as np
import pytest
from flax import nnx
from golden_cases import GOLDEN, load, to_hf

from hymba_jax.config import PRESETS, AttentionConfig, ComputeConfig, HymbaConfig
from hymba_jax.convert.mapping import ConversionError, hf_slices
from hymba_jax.errors import HymbaError
from hymba_jax.model import Hymba
from hymba_jax.model.abstract import param_shapes


def abstract_params(config, **compute):
    chosen = ComputeConfig(**compute)
    return nnx.split(nnx.eval_shape(lambda: Hymba(config, chosen, nnx.Rngs(0))))[1]


@pytest.mark.parametrize("scan_layers", [True, False])
def test_the_1_5b_has_the_names_and_shapes_of_the_hf_checkpoint(scan_layers):
    config = PRESETS["hymba-1.5b"]
    params = abstract_params(config, scan_layers=scan_layers)
    hf = jax.eval_shape(lambda params: to_hf(params, config, scan_layers=scan_layers), params)
    expected = json.loads((GOLDEN / "hymba_1p5b_params.json").read_text())
    assert {name: list(array.shape) for name, array in hf.items()} == expected["shapes"]
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == expected["total"]


@pytest.mark.parametrize(("preset", "millions"), [("hymba-125m", 125), ("hymba-350m", 350)])
def test_the_small_presets_have_about_the_parameters_of_their_names(preset, millions):
    count = sum(leaf.size for leaf in jax.tree.leaves(abstract_params(PRESETS[preset])))
    assert abs(count / 1e6 - millions) < 0.1 * millions


@pytest.mark.parametrize("scan_layers", [True, False])
@pytest.mark.parametrize("case", ["tiny-shared", "tiny-nometa"])
def test_round_trip_reproduces_every_bit(case, scan_layers):
    golden = load(case)
    _, params = golden.model(scan_layers=scan_layers)
    back = to_hf(params, golden.config, scan_layers=scan_layers)
    assert back.keys() == golden.weights.keys()
    for name, expected in golden.weights.items():
        np.testing.assert_array_equal(back[name], expected)


def test_untied_and_ungated_parameters_have_their_names():
    config = HymbaConfig(
        vocab_size=11,
        hidden_size=8,
        mlp_size=6,
        layers="G",
        attention=AttentionConfig(num_heads=2, num_kv_heads=1),
        mlp_activation="relu2",
        tie_embeddings=False,
    )
    params = abstract_params(config)
    hf = jax.eval_shape(lambda p: to_hf(p, config, scan_layers=True), params)
    assert hf["lm_head.weight"].shape == (11, 8)
    assert "model.layers.0.moe.experts.0.gate_proj.weight" not in hf


def test_parameters_that_the_table_does_not_know_are_named():
    config = load("tiny-ntk").config
    shapes = param_shapes(config, scan_layers=True)
    shapes[("bias",)] = (3,)
    del shapes[("embedding",)]
    with pytest.raises(ConversionError, match=r"no parameter embedding .* no rule matches bias"):
        hf_slices(shapes, config, scan_layers=True)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (HymbaConfig(layers="G M"), "the HF implementation has only attention and Mamba side by"),
        (HymbaConfig(layers="G S"), "layers 'G S': the HF implementation has only"),
        (HymbaConfig(layers="G-"), "and an MLP in every layer"),
        (HymbaConfig(fusion="concat"), "the HF implementation cannot fuse by 'concat'"),
        (HymbaConfig(attention=AttentionConfig(qk_norm="rms")), "query and key norms"),
    ],
)
def test_what_hf_checkpoints_cannot_hold_is_refused(config, message):
    with pytest.raises(HymbaError, match=message):
        hf_slices(param_shapes(config, scan_layers=True), config, scan_layers=True)
