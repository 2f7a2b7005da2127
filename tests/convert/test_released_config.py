"""The released config.json, there and back."""

import json
from pathlib import Path

import pytest
from golden_cases import CASES, GOLDEN

from hymba_jax.config import PRESETS, AttentionConfig, ConfigError, HymbaConfig
from hymba_jax.convert.released_config import config_from_released, config_to_released

RELEASED = Path(__file__).parents[3] / "shared" / "released" / "config.json"
SMALL = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "sliding_window": 8,
    "global_attn_idx": [0, 3],
}


@pytest.mark.skipif(not RELEASED.exists(), reason="the released files are not here")
def test_the_released_1_5b_is_the_preset():
    config = config_from_released(json.loads(RELEASED.read_text()))
    assert config.resolved() == PRESETS["hymba-1.5b"].resolved()


@pytest.mark.skipif(not RELEASED.exists(), reason="the released files are not here")
def test_what_we_write_means_what_was_read():
    """Every key of the released file that describes the architecture comes back as it was."""
    released = json.loads(RELEASED.read_text())
    written = config_to_released(config_from_released(released))
    differing = {key for key in written if key in released and written[key] != released[key]}
    assert differing == {"kq_head_dim"}  # -1 there: hidden_size / num_attention_heads
    assert written["kq_head_dim"] == released["hidden_size"] // released["num_attention_heads"]


@pytest.mark.parametrize("case", CASES)
def test_round_trip_of_golden_configs(case):
    config = config_from_released(json.loads((GOLDEN / case / "config.json").read_text()))
    written = json.loads(json.dumps(config_to_released(config)))
    assert config_from_released(written).resolved() == config.resolved()


@pytest.mark.parametrize(
    ("changes", "pattern"),
    [
        ({}, "G 2*W G 2*W"),
        ({"kv_reuse_group": [[1, 2], [4, 5]]}, "G Ww G Ww"),
        ({"kv_reuse_every_i_layer": 2, "global_attn_idx": []}, "3*Ww"),
        ({"kv_reuse_every_i_layer": 3, "global_attn_idx": None}, "2*Www"),
        ({"sliding_window": None}, "6*G"),
        ({"sliding_window": None, "kv_reuse_group": [[0, 1, 2]]}, "Ggg 3*G"),
    ],
)
def test_forms_of_global_layers_and_sharing(changes, pattern):
    assert config_from_released(SMALL | changes).layers == pattern


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kv_reuse_group": [[1, 2], [2, 3]]}, "its groups overlap"),
        ({"kv_reuse_group": [[1, 4]]}, "not of neighbouring layers"),
        ({"kv_reuse_group": [[5, 6]]}, "layers outside 0..5"),
        ({"kv_reuse_group": [[2, 3]]}, "'g' in 'Wg' reuses keys and values"),
        ({"num_experts": 4}, "num_experts is 4, and only 1 is supported"),
        ({"model_type": "llama"}, "model_type is 'llama', and only 'hymba' is supported"),
        ({"layer_type": ["h"] * 5 + ["a"]}, "layer_type has layers that are not hybrid"),
        ({"sliding_window": -1}, "window is -1"),
    ],
)
def test_what_cannot_be_read(changes, message):
    with pytest.raises(ConfigError, match=message):
        config_from_released(SMALL | changes)


def test_every_missing_key_is_named():
    with pytest.raises(ConfigError, match=r"vocab_size is missing; hidden_size is missing"):
        config_from_released({"num_hidden_layers": 3})


@pytest.mark.parametrize(
    "config",
    [
        HymbaConfig(layers="G W M"),
        HymbaConfig(layers="G A"),
        HymbaConfig(fusion="concat", attention=AttentionConfig(value_dim=64)),
    ],
)
def test_what_the_released_code_cannot_be(config):
    with pytest.raises(ConfigError, match="the released code"):
        config_to_released(config)
