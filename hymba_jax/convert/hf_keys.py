"""The keys of an HF config.json: each is read, has one supported value, is harmless, or is refused.

A key may be absent where the HF implementation's config class has a default and all published
Hymba models have that value, too. What else changes the model is required.
"""

import math
from collections.abc import Iterator, Mapping
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from hymba_jax.config.field_types import describe, fits, shown

# Options of the HF implementation of which this architecture has only one value.
FIXED: dict[str, Any] = {
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

# So are `global_attn_idx` unless `sliding_window` is null, one of the two ways to say which layers
# share keys and values, and the type of RoPE, see `hf_rope.py`. `rope` is required because it
# is off in the HF implementation unless a file says otherwise.
_REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "sliding_window",
    "max_position_embeddings",
    "mamba_d_state",
    "num_memory_tokens",
    "rope",
    "tie_word_embeddings",
)

_READ: dict[str, Any] = {
    "vocab_size": int,
    "hidden_size": int,
    "intermediate_size": int,
    "num_hidden_layers": int,
    "num_attention_heads": int,
    "num_key_value_heads": int,
    "kq_head_dim": int | None,
    "v_head_dim": int | None,
    "kq_norm": Literal["none", "rms", "perhead-rms"] | None,
    "sliding_window": int | None,
    "global_attn_idx": list[int] | None,
    "kv_reuse_group": list[list[int]] | None,
    "kv_reuse_every_i_layer": int | None,
    "layer_type": list[str] | None,
    "rope_type": str | None,
    "rope_theta": float | None,
    "orig_max_position_embeddings": int | None,
    "rope_parameters": dict[str, Any] | None,  # of transformers 5
    "rope_scaling": dict[str, Any] | None,
    "max_position_embeddings": int,
    "mamba_expand": int,
    "mamba_d_state": int,
    "mamba_d_conv": int,
    "mamba_dt_rank": int | Literal["auto"],
    "conv_dim": dict[str, int] | None,
    "num_memory_tokens": int,
    "mlp_hidden_act": Literal["silu", "relu2"],
    "tie_word_embeddings": bool,
    "rms_norm_eps": float,
    "bos_token_id": int | None,
    "eos_token_id": int | list[int],
    "pad_token_id": int | None,
    "dtype": str | None,  # of transformers 5
    "torch_dtype": str | None,
    "pruned_heads": dict[str, Any] | None,
}

# How the HF implementation computes, what it returns and how it is trained.
_OF_THE_HF_IMPLEMENTATION = {
    "attn_implementation",
    "attn_implementation_new",
    "calc_logits_for_entire_prompt",
    "initializer_range",
    "num_experts_per_tok",
    "output_router_logits",
    "router_aux_loss_coef",
    "seq_length",
    "use_cache",
    "use_mamba_kernels",
}
# What transformers writes into the config of every model.
_OF_EVERY_MODEL = {
    "_attn_implementation_autoset",
    "_commit_hash",
    "_name_or_path",
    "add_cross_attention",
    "architectures",
    "auto_map",
    "chunk_size_feed_forward",
    "cross_attention_hidden_size",
    "decoder_start_token_id",
    "finetuning_task",
    "id2label",
    "is_decoder",
    "is_encoder_decoder",
    "label2id",
    "name_or_path",
    "num_labels",
    "output_attentions",
    "output_hidden_states",
    "prefix",
    "problem_type",
    "return_dict",
    "sep_token_id",
    "task_specific_params",
    "tf_legacy_loss",
    "tie_encoder_decoder",
    "tokenizer_class",
    "torchscript",
    "transformers_version",
    "unsloth_fixed",
    "unsloth_version",
    "use_bfloat16",
}
# Defaults of generation, which are read from generation_config.json.
_OF_GENERATION = {
    "bad_words_ids",
    "begin_suppress_tokens",
    "diversity_penalty",
    "do_sample",
    "early_stopping",
    "encoder_no_repeat_ngram_size",
    "exponential_decay_length_penalty",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "length_penalty",
    "max_length",
    "min_length",
    "no_repeat_ngram_size",
    "num_beam_groups",
    "num_beams",
    "num_return_sequences",
    "output_scores",
    "remove_invalid_values",
    "repetition_penalty",
    "return_dict_in_generate",
    "suppress_tokens",
    "temperature",
    "top_k",
    "top_p",
    "typical_p",
}
_HARMLESS = _OF_THE_HF_IMPLEMENTATION | _OF_EVERY_MODEL | _OF_GENERATION


def key_problems(hf: Mapping[str, Any]) -> list[str]:
    """What is wrong with single keys, in words: missing, of a wrong type or value, or unknown."""
    required = [*_REQUIRED]
    if hf.get("sliding_window") is not None:
        required.append("global_attn_idx")
    if hf.get("kv_reuse_every_i_layer") in (None, -1):
        required.append("kv_reuse_group")
    problems = [f"{key} is missing" for key in required if key not in hf]
    for key, value in hf.items():
        if key in _READ:
            if not _fits(value, _READ[key]):
                problems.append(f"{key} is {shown(value)}, not {_describe(_READ[key])}")
        elif key in FIXED:
            if not (fits(value, type(FIXED[key])) and value == FIXED[key]):
                problems.append(f"{key} is {shown(value)}, and only {FIXED[key]!r} is supported")
        elif key not in _HARMLESS:
            problems.append(
                f"{key} is unknown: remove it from the file if it does not change the model"
            )
    problems += [f"{place} is {value}" for place, value in _not_finite(hf, "")]
    return problems


def _not_finite(value: Any, place: str) -> Iterator[tuple[str, float]]:
    """NaN and infinities, which Python reads from JSON though JSON has none, and their places."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _not_finite(item, f"{place}.{key}" if place else key)
    elif isinstance(value, list):
        for i, item in enumerate(value):
            yield from _not_finite(item, f"{place}[{i}]")
    elif isinstance(value, float) and not math.isfinite(value):
        yield place, value


def _fits(value: Any, kind: Any) -> bool:
    """Whether a JSON value is of this type; as in `field_types`, and in lists and objects."""
    if get_origin(kind) in (Union, UnionType):
        return any(_fits(value, choice) for choice in get_args(kind))
    if get_origin(kind) is list:
        return isinstance(value, list) and all(_fits(item, get_args(kind)[0]) for item in value)
    if get_origin(kind) is dict:
        return isinstance(value, dict) and all(
            _fits(item, get_args(kind)[1]) for item in value.values()
        )
    if kind is Any:
        return True
    return value is None if kind is NoneType else fits(value, kind)


def _describe(kind: Any) -> str:
    """The type in words."""
    if get_origin(kind) in (Union, UnionType):
        return " or ".join(map(_describe, get_args(kind)))
    if get_origin(kind) is list:
        (item,) = get_args(kind)
        return "a list of lists" if get_origin(item) is list else f"a list, each {_describe(item)}"
    if get_origin(kind) is dict:
        return "an object"
    return "null" if kind is NoneType else describe(kind)
