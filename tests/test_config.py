"""What can be built, and how the rest is refused."""

import dataclasses
import re

import pytest

from hymba_jax.config import (
    PRESETS,
    AttentionConfig,
    ComputeConfig,
    ConfigError,
    HymbaConfig,
    SSMConfig,
)


def test_every_error_is_reported_at_once():
    with pytest.raises(ConfigError) as error:
        HymbaConfig(
            vocab_size=0,
            hidden_size=30,
            num_meta_tokens=-1,
            attention=AttentionConfig(num_heads=4, num_kv_heads=3, window=0),
            ssm=SSMConfig(conv_kernel=0),
        )
    for words in (
        "vocab_size is 0",
        "num_meta_tokens is -1",
        "window is 0",
        "conv_kernel is 0",
        "num_heads 4 is not a multiple of num_kv_heads 3",
        "hidden_size 30 is not a multiple of num_heads 4",
        "bos_token_id 1 is outside the vocabulary",
    ):
        assert words in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": "many"}, "vocab_size is 'many', not an integer"),
        ({"hidden_size": 64.0}, "hidden_size is 64.0, not an integer"),
        ({"norm_eps": "small"}, "norm_eps is 'small', not a number"),
        ({"norm_eps": 0.0}, "norm_eps is 0.0, below 1e-20: the norm's gradient"),
        ({"tie_embeddings": 1}, "tie_embeddings is 1, not true or false"),
        ({"fusion": "sum"}, 'fusion is \'sum\', not "mean" or "concat"'),
        ({"layers": "G Wx"}, "layers 'G Wx': unknown layer x"),
        ({"ssm": SSMConfig(dt_rank="some")}, "dt_rank is 'some', not an integer or \"auto\""),
        ({"attention": AttentionConfig(head_dim=7)}, "head_dim 7 is not an even number"),
        ({"attention": AttentionConfig(value_dim=64)}, 'fusion "mean" needs equal widths'),
        (
            {"max_positions": 1024, "attention": AttentionConfig(rope_type="ntk")},
            "rope_original_positions 2048 is not below twice max_positions",
        ),
        (
            {"max_positions": 1025, "attention": AttentionConfig(rope_type="ntk", rope_theta=100)},
            '"ntk" makes a base of 0.078 of rope_theta 100, which has to be at least 1',
        ),
        (
            {"layers": "S", "ssm": SSMConfig(head_dim=48)},
            "the 3200 SSM channels are not a multiple of ssm.head_dim 48",
        ),
        (
            {"layers": "S", "ssm": SSMConfig(groups=4)},
            "the 50 SSM heads are not a multiple of ssm.groups 4",
        ),
        ({"attention": 3}, "attention is 3, not a AttentionConfig"),
        ({"eos_token_id": 32001}, "eos_token_id 32001 is outside the vocabulary of 32001"),
    ],
)
def test_impossible_values(changes, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        HymbaConfig(**changes)


def test_compute_is_checked_too():
    with pytest.raises(ConfigError, match=r"dtype is 'float8', .*; remat is 'all'"):
        ComputeConfig(dtype="float8", remat="all")


@pytest.mark.parametrize(
    ("preset", "layers", "widths"),
    [
        ("hymba-125m", 24, (512, 1024, 64, 128, 32)),
        ("hymba-350m", 32, (768, 1536, 64, 128, 48)),
        ("hymba-1.5b", 32, (1600, 3200, 64, 128, 100)),
    ],
)
def test_presets_have_the_paper_s_sizes(preset, layers, widths):
    config = PRESETS[preset]
    assert config.num_layers == layers
    assert sum(spec.attention == "global" for spec in config.layer_specs) == 3
    actual = (
        config.hidden_size,
        config.channels,
        config.head_dim,
        config.value_dim,
        config.dt_rank,
    )
    assert actual == widths


def test_auto_follows_a_change_and_resolved_does_not():
    wider = dataclasses.replace(PRESETS["hymba-125m"], hidden_size=1024)
    assert (wider.head_dim, wider.value_dim, wider.dt_rank) == (128, 256, 64)
    with pytest.raises(ConfigError, match="equal widths"):
        dataclasses.replace(PRESETS["hymba-125m"].resolved(), hidden_size=1024)
