"""The released code's config.json, read and written."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from hymba_jax.config import AttentionConfig, Auto, ConfigError, HymbaConfig, SSMConfig
from hymba_jax.layer_pattern import LayerSpec, Segment, format_pattern

# What the released code can vary and this architecture does not, with the one value it has here.
_FIXED: dict[str, Any] = {
    "model_type": "hymba",
    "hidden_act": "silu",
    "mamba_conv_bias": True,
    "mamba_inner_layernorms": True,
    "mamba_proj_bias": False,
    "attention_dropout": 0.0,
    "attn_hidden_size": -1,
    "kv_weight_reuse": False,
    "memory_tokens_interspersed_every": 0,
    "num_experts": 1,
    "num_mamba": 1,
    "rope": True,
}
_REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
)


def config_from_released(released: Mapping[str, Any]) -> HymbaConfig:
    """The architecture that a released config.json describes.

    Raises:
      ConfigError: naming every key that is missing or that no Hymba of ours can have.
    """
    problems = [f"{key} is missing" for key in _REQUIRED if key not in released]
    problems += [
        f"{key} is {released[key]!r}, not a whole number"
        for key in _REQUIRED
        if key in released and type(released[key]) is not int
    ]
    problems += [
        f"{key} is {released[key]!r}, and only {value!r} is supported"
        for key, value in _FIXED.items()
        if released.get(key, value) != value
    ]
    if set(released.get("layer_type") or ["h"]) != {"h"}:
        problems.append("layer_type has layers that are not hybrid")
    if problems:
        raise ConfigError("config.json cannot be read: " + "; ".join(problems))
    defaults = HymbaConfig()
    attention = AttentionConfig(
        num_heads=released["num_attention_heads"],
        num_kv_heads=released["num_key_value_heads"],
        head_dim=_positive_or_auto(released.get("kq_head_dim")),
        value_dim=_positive_or_auto(released.get("v_head_dim")),
        window=released.get("sliding_window") or defaults.attention.window,
        qk_norm=released.get("kq_norm") or "none",
        rope_type=released.get("rope_type") or "default",
        rope_theta=released.get("rope_theta", defaults.attention.rope_theta),
        rope_original_positions=released.get("orig_max_position_embeddings")
        or defaults.attention.rope_original_positions,
    )
    ssm = SSMConfig(
        expand=released.get("mamba_expand", defaults.ssm.expand),
        state_size=released.get("mamba_d_state", defaults.ssm.state_size),
        conv_kernel=released.get("mamba_d_conv", defaults.ssm.conv_kernel),
        dt_rank=released.get("mamba_dt_rank", defaults.ssm.dt_rank),
    )
    return HymbaConfig(
        vocab_size=released["vocab_size"],
        hidden_size=released["hidden_size"],
        mlp_size=released["intermediate_size"],
        layers=_pattern(released),
        attention=attention,
        ssm=ssm,
        num_meta_tokens=released.get("num_memory_tokens", 0),
        max_positions=released.get("max_position_embeddings", defaults.max_positions),
        mlp_activation=released.get("mlp_hidden_act", defaults.mlp_activation),
        tie_embeddings=released.get("tie_word_embeddings", defaults.tie_embeddings),
        norm_eps=released.get("rms_norm_eps", defaults.norm_eps),
        bos_token_id=released.get("bos_token_id", defaults.bos_token_id),
        eos_token_id=released.get("eos_token_id", defaults.eos_token_id),
        pad_token_id=released.get("pad_token_id", defaults.pad_token_id),
    )


def config_to_released(config: HymbaConfig) -> dict[str, Any]:
    """A config.json that the released code reads as this architecture.

    Raises:
      ConfigError: the released code has no such architecture.
    """
    require_released_form(config)
    specs, attention, ssm = config.layer_specs, config.attention, config.ssm
    windowed = any(spec.attention == "window" for spec in specs)
    return _FIXED | {
        "architectures": ["HymbaForCausalLM"],
        "vocab_size": config.num_embeddings,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.mlp_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.num_kv_heads,
        "kq_head_dim": config.head_dim,
        "v_head_dim": config.value_dim,
        "kq_norm": attention.qk_norm,
        "sliding_window": attention.window if windowed else None,
        "global_attn_idx": [i for i, spec in enumerate(specs) if spec.attention == "global"],
        "kv_reuse_group": _sharing_groups(specs),
        "kv_reuse_every_i_layer": -1,
        "layer_type": ["h"] * config.num_layers,
        "rope_type": config.rope_type,
        "rope_theta": attention.rope_theta,
        "orig_max_position_embeddings": attention.rope_original_positions,
        "max_position_embeddings": config.max_positions,
        "seq_length": config.max_positions,
        "mamba_expand": ssm.expand,
        "mamba_d_state": ssm.state_size,
        "mamba_d_conv": ssm.conv_kernel,
        "mamba_dt_rank": config.dt_rank,
        "conv_dim": {str(i): config.channels for i in range(config.num_layers)},
        "num_memory_tokens": config.num_meta_tokens,
        "mlp_hidden_act": config.mlp_activation,
        "tie_word_embeddings": config.tie_embeddings,
        "rms_norm_eps": config.norm_eps,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "pad_token_id": config.pad_token_id,
    }


def with_dtype(released: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """The same config.json, which says that the weights are of this dtype."""
    key = "dtype" if "dtype" in released else "torch_dtype"  # transformers 5, or 4
    return {**released, key: dtype}


def require_released_form(config: HymbaConfig) -> None:
    """Raises ConfigError if the released code has no such architecture."""
    if config.fusion != "mean":
        raise ConfigError(f"the released code cannot fuse by {config.fusion!r}")
    if any(spec.attention is None or not spec.ssm for spec in config.layer_specs):
        raise ConfigError(f"layers {config.layers!r}: the released code has only hybrid layers")


def _positive_or_auto(value: int | None) -> int | Auto:
    return value if value is not None and value > 0 else "auto"


def _pattern(released: Mapping[str, Any]) -> str:
    """The layers' pattern from global_attn_idx, sliding_window and the sharing groups.

    A unit is a sharing group; a layer that shares with nobody is one by itself.
    """
    depth, window = released["num_hidden_layers"], released.get("sliding_window")
    global_layers = range(depth) if window is None else released.get("global_attn_idx") or ()
    reusing = _reusing_layers(released, depth)
    units: list[list[LayerSpec]] = []
    for i in range(depth):
        spec = LayerSpec("global" if i in global_layers else "window", ssm=True)
        if i in reusing:
            units[-1].append(dataclasses.replace(spec, reuses_kv=True))
        else:
            units.append([spec])
    return format_pattern([Segment(tuple(unit), 1) for unit in units])


def _reusing_layers(released: Mapping[str, Any], depth: int) -> set[int]:
    """The layers that read the keys and values of the layer before them."""
    every = released.get("kv_reuse_every_i_layer") or -1
    if every > 0:
        return {i for i in range(depth) if i % every}
    groups = released.get("kv_reuse_group") or []
    members = [i for group in groups for i in group]
    problems = []
    if len(members) != len(set(members)):
        problems.append("its groups overlap")
    if any(list(group) != list(range(group[0], group[0] + len(group))) for group in groups):
        problems.append("its groups are not of neighbouring layers")
    if any(not 0 <= i < depth for i in members):
        problems.append(f"it names layers outside 0..{depth - 1}")
    if problems:
        raise ConfigError(f"kv_reuse_group {groups}: {'; '.join(problems)}")
    return {i for group in groups for i in group[1:]}


def _sharing_groups(specs: tuple[LayerSpec, ...]) -> list[list[int]]:
    groups: list[list[int]] = []
    for i, spec in enumerate(specs):
        if spec.reuses_kv:
            groups[-1].append(i)
        else:
            groups.append([i])
    return [group for group in groups if len(group) > 1]
