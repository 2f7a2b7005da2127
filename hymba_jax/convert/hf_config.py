"""The HF implementation's config.json, read and written."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, cast

from hymba_jax.config import AttentionConfig, Auto, ConfigError, HymbaConfig, RopeType, SSMConfig
from hymba_jax.config.field_types import shown
from hymba_jax.config.layer_pattern import MAX_LAYERS, GroupSpec, LayerSpec, format_pattern
from hymba_jax.convert.hf_keys import FIXED, key_problems
from hymba_jax.convert.hf_rope import ROPE_KEYS, SPELLINGS, RopeSettings, read_rope
from hymba_jax.errors import HymbaError
from hymba_jax.files import Location
from hymba_jax.hf_files import HF_CONFIG
from hymba_jax.tokenizer import Tokenizer


def config_from_hf(hf: Mapping[str, Any]) -> HymbaConfig:
    """The architecture that an HF config.json describes.

    Raises:
      ConfigError: naming every key that is missing or unknown, and every value that has a wrong
        type, contradicts another or is of no architecture that is supported here.
    """
    problems = key_problems(hf)
    if not problems:
        rope, problems = read_rope(hf)
        problems += [*_value_problems(hf)]
    if problems:
        raise ConfigError("; ".join(problems))
    return _architecture(hf, rope)


def read_architecture(directory: Location, hf: Mapping[str, Any]) -> HymbaConfig:
    """The architecture of an HF directory, whose tokenizer decides what config.json leaves open.

    That is the beginning-of-sequence token where it is null, and of several end tokens the one that
    ends a sequence.

    Args:
      hf: its config.json.

    Raises:
      HymbaError: as for `config_from_hf`, or the tokenizer cannot be read; each names its file.
    """
    try:
        config = config_from_hf(hf)
    except ConfigError as error:
        raise HymbaError(f"{directory / HF_CONFIG}: {error}") from error
    is_open = hf.get("bos_token_id") is None or len(eos_token_ids(hf)) > 1
    if not is_open or not (directory / "tokenizer.json").is_file():
        return config
    tokenizer = Tokenizer.load(directory)
    if hf.get("bos_token_id") is None and tokenizer.bos_id is not None:
        config = dataclasses.replace(config, bos_token_id=tokenizer.bos_id)
    if tokenizer.eos_id in eos_token_ids(hf):
        config = dataclasses.replace(config, eos_token_id=tokenizer.eos_id)
    return config


def eos_token_ids(hf: Mapping[str, Any]) -> list[int]:
    """The tokens that end a sequence; transformers allows several."""
    ids = hf.get("eos_token_id", HymbaConfig().eos_token_id)
    return ids if isinstance(ids, list) else [ids]


def _value_problems(hf: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with values of the right type."""
    depth, window = hf["num_hidden_layers"], hf["sliding_window"]
    if not 0 < depth <= MAX_LAYERS:
        yield f"num_hidden_layers is {shown(depth)}, not 1 to {MAX_LAYERS}"
        return
    if window is not None and window < 1:
        yield f"sliding_window is {window}, not above 0 (null is none)"
    yield from _sharing_problems(hf, depth)
    outside = [i for i in hf.get("global_attn_idx") or [] if not 0 <= i < depth]
    if outside:
        yield f"global_attn_idx names layers outside 0..{depth - 1}: {outside}"
    kinds = hf.get("layer_type")
    if kinds is not None and set(kinds) != {"h"}:
        yield "layer_type has layers that are not hybrid"
    if kinds is not None and len(kinds) != depth:
        yield f"layer_type is of {len(kinds)} layers, num_hidden_layers is {depth}"
    channels = hf.get("mamba_expand", SSMConfig().expand) * hf["hidden_size"]
    others = {size for size in (hf.get("conv_dim") or {}).values() if size != channels}
    if others:
        yield f"conv_dim is {min(others)} in a layer, and only {channels} is supported"
    if hf.get("pruned_heads"):
        yield "pruned_heads names heads, and pruned heads are not supported"
    eos, vocab_size = eos_token_ids(hf), hf["vocab_size"]
    if not eos:
        yield "eos_token_id is an empty list"
    for token in eos[1:]:  # HymbaConfig looks at the first
        if not 0 <= token < vocab_size:
            yield f"eos_token_id {token} is outside the vocabulary of {vocab_size}"
    dtypes = [hf[key] for key in ("dtype", "torch_dtype") if hf.get(key) is not None]
    if len({*dtypes}) > 1:
        yield f"dtype is {dtypes[0]!r}, torch_dtype is {dtypes[1]!r}: they differ"


def _architecture(hf: Mapping[str, Any], rope: RopeSettings) -> HymbaConfig:
    """The architecture, from values that are valid individually."""
    defaults = HymbaConfig()
    attention = AttentionConfig(
        num_heads=hf["num_attention_heads"],
        num_kv_heads=hf["num_key_value_heads"],
        head_dim=_positive_or_auto(hf.get("kq_head_dim")),
        value_dim=_positive_or_auto(hf.get("v_head_dim")),
        window=_or_default(hf["sliding_window"], defaults.attention.window),
        qk_norm=hf.get("kq_norm") or "none",
        rope_type=cast(RopeType, rope.rope_type),
        rope_theta=rope.rope_theta,
        rope_original_positions=rope.rope_original_positions,
    )
    ssm = SSMConfig(
        expand=hf.get("mamba_expand", defaults.ssm.expand),
        state_size=hf.get("mamba_d_state", defaults.ssm.state_size),
        conv_kernel=hf.get("mamba_d_conv", defaults.ssm.conv_kernel),
        dt_rank=hf.get("mamba_dt_rank", defaults.ssm.dt_rank),
    )
    return HymbaConfig(
        vocab_size=hf["vocab_size"],
        hidden_size=hf["hidden_size"],
        mlp_size=hf["intermediate_size"],
        layers=_pattern(hf),
        attention=attention,
        ssm=ssm,
        num_meta_tokens=hf.get("num_memory_tokens", 0),
        max_positions=hf["max_position_embeddings"],
        mlp_activation=hf.get("mlp_hidden_act", defaults.mlp_activation),
        tie_embeddings=hf["tie_word_embeddings"],
        norm_eps=hf.get("rms_norm_eps", defaults.norm_eps),
        bos_token_id=_or_default(hf.get("bos_token_id"), defaults.bos_token_id),
        eos_token_id=eos_token_ids(hf)[0],
        pad_token_id=_or_default(hf.get("pad_token_id"), defaults.pad_token_id),
    )


def config_to_hf(config: HymbaConfig) -> dict[str, Any]:
    """A config.json that the HF implementation reads as this architecture.

    Raises:
      ConfigError: the HF implementation has no such architecture.
    """
    require_hf_form(config)
    specs, attention, ssm = config.layer_specs, config.attention, config.ssm
    windowed = any(spec.attention == "window" for spec in specs)
    return FIXED | {
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


def changed(hf: Mapping[str, Any], before: HymbaConfig, after: HymbaConfig) -> dict[str, Any]:
    """The config.json of one architecture with the differences of another applied.

    Raises:
      ConfigError: the HF implementation has no such architecture.
    """
    old, new = config_to_hf(before), config_to_hf(after)
    changes = {key: value for key, value in new.items() if value != old[key]}
    kept = dict(hf)
    if changes.keys() & {*ROPE_KEYS}:
        changes |= {key: new[key] for key in ROPE_KEYS}
        kept = {key: value for key, value in kept.items() if key not in SPELLINGS}
    return kept | changes


def with_dtype(hf: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """The same config.json, with this dtype of the weights."""
    spellings = [key for key in ("dtype", "torch_dtype") if key in hf]
    # transformers 5 writes the first, transformers 4 the second, which both read.
    return {**hf, **dict.fromkeys(spellings or ["torch_dtype"], dtype)}


def require_hf_form(config: HymbaConfig) -> None:
    """Raises ConfigError if the HF implementation has no such architecture."""
    if config.fusion != "mean":
        raise ConfigError(f"the HF implementation cannot fuse by {config.fusion!r}")
    hybrid = (spec.attention and spec.ssm == "mamba" and spec.mlp for spec in config.layer_specs)
    if not all(hybrid):
        raise ConfigError(
            f"layers {config.layers!r}: the HF implementation has only attention and Mamba side by "
            "side, and an MLP in every layer"
        )


def _positive_or_auto(value: int | None) -> int | Auto:
    return value if value is not None and value > 0 else "auto"


def _or_default(value: int | None, default: int) -> int:
    return default if value is None else value


def _pattern(hf: Mapping[str, Any]) -> str:
    """The layers' pattern from global_attn_idx, sliding_window and the sharing groups.

    Layers that share keys and values are a group, any other layer is one by itself.
    """
    depth, window = hf["num_hidden_layers"], hf["sliding_window"]
    global_layers = range(depth) if window is None else hf["global_attn_idx"] or ()
    reusing = _reusing_every(hf, depth) | _reusing_in_groups(hf)
    groups: list[list[LayerSpec]] = []
    for i in range(depth):
        spec = LayerSpec("global" if i in global_layers else "window", ssm="mamba")
        if i in reusing:
            groups[-1].append(dataclasses.replace(spec, reuses_kv=True))
        else:
            groups.append([spec])
    return format_pattern([GroupSpec(tuple(group), 1) for group in groups])


def _reusing_every(hf: Mapping[str, Any], depth: int) -> set[int]:
    """The layers that kv_reuse_every_i_layer says read the keys and values of the one before."""
    every = hf.get("kv_reuse_every_i_layer") or -1
    return {i for i in range(depth) if i % every} if every > 0 else set()


def _reusing_in_groups(hf: Mapping[str, Any]) -> set[int]:
    """The same that kv_reuse_group says."""
    return {i for group in hf.get("kv_reuse_group") or [] for i in group[1:]}


def _sharing_problems(hf: Mapping[str, Any], depth: int) -> Iterator[str]:
    groups = hf.get("kv_reuse_group") or []
    members = [i for group in groups for i in group]
    problems = []
    if len(members) != len(set(members)):
        problems.append("its groups overlap")
    if any(group != [*range(group[0], group[0] + len(group))] for group in groups if group):
        problems.append("its groups are not of neighbouring layers")
    if any(not 0 <= i < depth for i in members):
        problems.append(f"it names layers outside 0..{depth - 1}")
    if problems:
        yield f"kv_reuse_group {groups}: {'; '.join(problems)}"
    every, grouped = _reusing_every(hf, depth), _reusing_in_groups(hf)
    if every and grouped and every != grouped:
        yield "kv_reuse_every_i_layer and kv_reuse_group contradict each other, keep one"


def _sharing_groups(specs: tuple[LayerSpec, ...]) -> list[list[int]]:
    groups: list[list[int]] = []
    for i, spec in enumerate(specs):
        if spec.reuses_kv:
            groups[-1].append(i)
        else:
            groups.append([i])
    return [group for group in groups if len(group) > 1]
