"""The HF config.json, read and written."""

import dataclasses
import json
from pathlib import Path

import pytest
import tokenizers
from golden_cases import CASES, GOLDEN
from tokenizers import models

from hymba_jax.config import PRESETS, AttentionConfig, ConfigError, HymbaConfig
from hymba_jax.convert.hf_config import (
    changed,
    config_from_hf,
    config_to_hf,
    eos_token_ids,
    read_architecture,
    with_dtype,
)
from hymba_jax.tokenizer import Tokenizer

BASE_1_5B = Path(__file__).parents[3] / "shared" / "released" / "config.json"
SMALL = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "sliding_window": 8,
    "global_attn_idx": [0, 3],
    "kv_reuse_group": None,
    "max_position_embeddings": 128,
    "mamba_d_state": 16,
    "num_memory_tokens": 4,
    "rope": True,
    "rope_type": None,
    "tie_word_embeddings": True,
}


@pytest.mark.skipif(not BASE_1_5B.exists(), reason="Hymba-1.5B-Base's config.json is not here")
def test_hymba_1_5b_is_the_preset():
    config = config_from_hf(json.loads(BASE_1_5B.read_text()))
    assert config.resolved() == PRESETS["hymba-1.5b"].resolved()


@pytest.mark.skipif(not BASE_1_5B.exists(), reason="Hymba-1.5B-Base's config.json is not here")
def test_config_round_trip():
    """Every key of the file that describes the architecture comes back as it was."""
    hf = json.loads(BASE_1_5B.read_text())
    written = config_to_hf(config_from_hf(hf))
    differing = {key for key in written if key in hf and written[key] != hf[key]}
    assert differing == {"kq_head_dim"}  # -1 there: hidden_size / num_attention_heads
    assert written["kq_head_dim"] == hf["hidden_size"] // hf["num_attention_heads"]


@pytest.mark.parametrize(
    ("changes", "bos", "eos"),
    [
        ({"bos_token_id": None, "eos_token_id": [5, 2]}, 3, 2),
        ({"bos_token_id": 1, "eos_token_id": [5, 7]}, 1, 5),
        ({"bos_token_id": 4, "eos_token_id": 9}, 4, 9),
    ],
)
def test_the_tokenizer_decides_special_tokens_that_are_left_open(changes, bos, eos, tmp_path):
    without = read_architecture(tmp_path, SMALL | changes)
    assert without.bos_token_id == (changes["bos_token_id"] or 1)
    model = tokenizers.Tokenizer(models.WordLevel({"a": 0, "b": 1, "</s>": 2, "<s>": 3}, "a"))
    Tokenizer(model, "<s>", "</s>").save(tmp_path)
    config = read_architecture(tmp_path, SMALL | changes)
    assert (config.bos_token_id, config.eos_token_id) == (bos, eos)


@pytest.mark.parametrize("case", CASES)
def test_round_trip_of_golden_configs(case):
    config = config_from_hf(json.loads((GOLDEN / case / "config.json").read_text()))
    written = json.loads(json.dumps(config_to_hf(config)))
    assert config_from_hf(written).resolved() == config.resolved()


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
    assert config_from_hf(SMALL | changes).layers == pattern


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
        ({"sliding_window": -1}, "sliding_window is -1, not above 0"),
        ({"sliding_window": 0}, "sliding_window is 0, not above 0"),
        ({"global_attn_idx": [0, 6]}, r"global_attn_idx names layers outside 0\.\.5: \[6\]"),
        ({"global_attn_idx": [-1]}, r"global_attn_idx names layers outside 0\.\.5: \[-1\]"),
        ({"layer_type": ["h"] * 5}, "layer_type is of 5 layers, num_hidden_layers is 6"),
        ({"kv_reuse_group": [[1, 2]], "kv_reuse_every_i_layer": 2}, "contradict"),
        ({"conv_dim": {"0": 64}}, "conv_dim is 64 in a layer, and only 128 is supported"),
        ({"num_hidden_layers": 10**12}, "num_hidden_layers is 1000000000000, not 1 to 4096"),
        ({"rope": False}, "rope is False, and only True is supported"),
        ({"pruned_heads": {"0": [1]}}, "pruned heads are not supported"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is unknown: remove it"),
        ({"per_layer_config": {}}, "per_layer_config is unknown"),
        ({"dtype": "bfloat16", "torch_dtype": "float32"}, "dtype is 'bfloat16', torch_dtype is"),
    ],
)
def test_what_cannot_be_read(changes, message):
    with pytest.raises(ConfigError, match=message):
        config_from_hf(SMALL | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer_type": 5}, "layer_type is 5, not a list"),
        ({"global_attn_idx": "0"}, "global_attn_idx is '0', not a list, each an integer"),
        ({"global_attn_idx": [True]}, r"global_attn_idx is \[True\], not a list"),
        ({"kv_reuse_group": [1, 2]}, r"kv_reuse_group is \[1, 2\], not a list of lists or null"),
        ({"num_hidden_layers": 6.0}, "num_hidden_layers is 6.0, not an integer"),
        ({"num_memory_tokens": True}, "num_memory_tokens is True, not an integer"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings is 1, not true or false"),
        ({"mamba_conv_bias": 1}, "mamba_conv_bias is 1, and only True is supported"),
        ({"num_experts": True}, "num_experts is True, and only 1 is supported"),
        ({"mamba_dt_rank": "big"}, "mamba_dt_rank is 'big', not an integer or \"auto\""),
        ({"mlp_hidden_act": "gelu"}, 'mlp_hidden_act is \'gelu\', not "silu" or "relu2"'),
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps is '1e-6', not a number"),
        ({"rope_theta": float("inf")}, "rope_theta is inf"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ({"task_specific_params": {"a": [float("-inf")]}}, r"task_specific_params.a\[0\] is -inf"),
        ({"eos_token_id": None}, "eos_token_id is None, not an integer or a list"),
        ({"rope_parameters": "ntk"}, "rope_parameters is 'ntk', not an object or null"),
    ],
)
def test_wrong_types(changes, message):
    with pytest.raises(ConfigError, match=message):
        config_from_hf(SMALL | changes)


def test_all_problems_are_in_one_line():
    changes = {"layer_type": 5, "global_attn_idx": "0", "vocab_size": 97.0, "surprise": 1}
    with pytest.raises(ConfigError) as caught:
        config_from_hf(SMALL | changes)
    assert "\n" not in str(caught.value)
    for key in changes:
        assert f"{key} is " in str(caught.value)


def test_every_missing_key_is_named():
    with pytest.raises(ConfigError, match=r"vocab_size is missing; hidden_size is missing"):
        config_from_hf({"num_hidden_layers": 3})


@pytest.mark.parametrize("case", CASES)
def test_without_any_key_the_model_is_the_same_or_refused(case):
    whole = json.loads((GOLDEN / case / "config.json").read_text())
    expected = config_from_hf(whole).resolved()
    for key in whole:
        try:
            held = config_from_hf({k: v for k, v in whole.items() if k != key}).resolved()
        except ConfigError as error:
            assert "missing" in str(error)  # noqa: PT017
        else:
            assert held == expected, key


@pytest.mark.skipif(not BASE_1_5B.exists(), reason="Hymba-1.5B-Base's config.json is not here")
def test_all_keys_of_hymba_1_5b_are_known_and_others_are_not():
    hf = json.loads(BASE_1_5B.read_text())
    config_from_hf(hf)
    with pytest.raises(ConfigError, match="Rope_Theta is unknown"):
        config_from_hf(hf | {"Rope_Theta": 1e6})


FLAT = {"rope_type": "ntk", "rope_theta": 5e5, "orig_max_position_embeddings": 32}
NESTED = {"rope_type": "ntk", "rope_theta": 5e5, "original_max_position_embeddings": 32}
NO_ROPE = {key: value for key, value in SMALL.items() if key != "rope_type"}


class TestRope:
    @pytest.mark.parametrize(
        "spelling",
        [
            FLAT,
            {"rope_parameters": NESTED},
            # As transformers 5.24 writes what was given as rope_scaling and rope_theta.
            {"rope_parameters": {**NESTED, "type": "ntk"}},
            {"rope_parameters": {"rope_type": "ntk", "rope_theta": 5e5}, **FLAT},
            FLAT | {"rope_scaling": {"type": "ntk"}, "rope_type": None},
            {"rope_parameters": {**NESTED, "partial_rotary_factor": 1.0}, "rope_scaling": None},
        ],
    )
    def test_all_spellings_mean_the_same(self, spelling):
        attention = config_from_hf(NO_ROPE | spelling).attention
        assert attention.rope_type == "ntk"
        assert attention.rope_theta == 5e5
        assert attention.rope_original_positions == 32

    def test_null_is_rope_without_scaling(self):
        assert config_from_hf(SMALL).attention.rope_type == "default"

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            (
                {"rope_type": "default", "rope_parameters": {"rope_type": "ntk"}},
                "rope_type is 'default', rope_parameters.rope_type is 'ntk': they contradict",
            ),
            (
                {"rope_theta": 1e4, "rope_parameters": {"rope_theta": 5e5}},
                "rope_theta is 10000.0, rope_parameters.rope_theta is 500000.0: they contradict",
            ),
            ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling.factor is 2.0"),
            ({"rope_scaling": {"type": "linear"}}, "rope_type is 'linear', not default, ntk or"),
            ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type is 'yarn', not default"),
            ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5"),
            ({"rope_parameters": {"rope_theta": "big"}}, "rope_theta is 'big', of a wrong type"),
            ({"rope_parameters": {"full_attention": {}}}, "rope_parameters.full_attention is {}"),
            ({"rope_type": "ntk"}, "orig_max_position_embeddings is missing"),
        ],
    )
    def test_what_is_refused(self, changes, message):
        with pytest.raises(ConfigError, match=message):
            config_from_hf(SMALL | changes)

    def test_without_a_type_it_is_refused(self):
        with pytest.raises(ConfigError, match="rope_type is missing"):
            config_from_hf(NO_ROPE | {"rope_parameters": {"rope_theta": 1e4}})

    def test_a_change_leaves_one_spelling(self):
        hf = NO_ROPE | {"rope_parameters": NESTED}
        before = config_from_hf(hf)
        after = dataclasses.replace(
            before, attention=dataclasses.replace(before.attention, rope_theta=1e6)
        )
        written = changed(hf, before, after)
        assert "rope_parameters" not in written
        assert config_from_hf(written) == after
        after = dataclasses.replace(before, norm_eps=1e-5)
        assert changed(hf, before, after) == hf | {"rms_norm_eps": 1e-5}


class TestTokens:
    def test_several_end_tokens(self):
        hf = SMALL | {"eos_token_id": [5, 7]}
        assert eos_token_ids(hf) == [5, 7]
        assert config_from_hf(hf).eos_token_id == 5

    def test_null_is_no_token(self):
        config = config_from_hf(SMALL | {"pad_token_id": None, "bos_token_id": None})
        assert config == config_from_hf(SMALL)

    @pytest.mark.parametrize("ids", [[], [2, 97], [2, -1], ["2"], [2.0]])
    def test_what_is_no_end_token(self, ids):
        with pytest.raises(ConfigError, match="eos_token_id"):
            config_from_hf(SMALL | {"eos_token_id": ids})


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"dtype": "bfloat16"}, {"dtype": "float32"}),
        ({"torch_dtype": "bfloat16"}, {"torch_dtype": "float32"}),
        ({}, {"torch_dtype": "float32"}),
        (
            {"dtype": "bfloat16", "torch_dtype": "bfloat16"},
            {"dtype": "float32", "torch_dtype": "float32"},
        ),
    ],
)
def test_dtype_in_its_own_spelling(before, after):
    assert with_dtype(before, "float32") == after


@pytest.mark.parametrize(
    "config",
    [
        HymbaConfig(layers="G W M"),
        HymbaConfig(layers="G A"),
        HymbaConfig(fusion="concat", attention=AttentionConfig(value_dim=64)),
    ],
)
def test_architectures_that_the_hf_implementation_does_not_have(config):
    with pytest.raises(ConfigError, match="the HF implementation"):
        config_to_hf(config)
