"""The one table between our parameters and the names of the released checkpoint.

A released tensor is made of one or more of our arrays: each brought to the released layout, then
laid one after the other along the first axis. Ours are kept apart where the released code splits
a product's result (`in_proj`), so that each part can be sharded by itself.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hymba_jax.config import HymbaConfig
from hymba_jax.convert.released_config import require_released_form
from hymba_jax.errors import HymbaError
from hymba_jax.layer_pattern import LayerSpec
from hymba_jax.model.hymba import layer_places
from hymba_jax.types import Array

type Path = tuple[Any, ...]
type Place = tuple[Path, int | None]  # a parameter, and which of its stack
type FlatParams = dict[Path, Array]


class Layout(NamedTuple):
    """How an array of ours lies in the released checkpoint, and back."""

    to_released: Callable[[Array], Array]
    to_ours: Callable[[Array], Array]


SAME = Layout(lambda a: a, lambda a: a)
TRANSPOSED = Layout(lambda a: a.T, lambda a: a.T)  # linear weights are (out, in) there
CONV = Layout(lambda a: a.T[:, None, :], lambda a: a[:, 0, :].T)  # (channels, 1, kernel) there


class Rule(NamedTuple):
    """A released tensor and the arrays of ours that it is made of, in order."""

    released: str
    ours: tuple[str, ...]
    layout: Layout


_ATTENTION_KV = ("mixer.attention.key_proj.kernel", "mixer.attention.value_proj.kernel")
_SSM_IN = ("mixer.ssm.in_proj.kernel", "mixer.ssm.gate_proj.kernel")

_MODEL_RULES = (
    Rule("model.embed_tokens.weight", ("embedding",), SAME),
    Rule("model.final_layernorm.weight", ("final_norm.scale",), SAME),
)
_META_RULE = Rule("model.memory_tokens", ("meta_tokens",), SAME)
_HEAD_RULE = Rule("lm_head.weight", ("lm_head.kernel",), TRANSPOSED)
_BLOCK_RULES = (
    Rule("input_layernorm.weight", ("mixer_norm.scale",), SAME),
    Rule("mamba.out_proj.weight", ("mixer.out_proj.kernel",), TRANSPOSED),
    Rule("pre_moe_layernorm.weight", ("mlp_norm.scale",), SAME),
    Rule("moe.experts.0.up_proj.weight", ("mlp.up_proj.kernel",), TRANSPOSED),
    Rule("moe.experts.0.down_proj.weight", ("mlp.down_proj.kernel",), TRANSPOSED),
    Rule("mamba.conv1d.weight", ("mixer.ssm.conv_kernel",), CONV),
    Rule("mamba.conv1d.bias", ("mixer.ssm.conv_bias",), SAME),
    Rule("mamba.x_proj.0.weight", ("mixer.ssm.x_proj.kernel",), TRANSPOSED),
    Rule("mamba.dt_proj.0.weight", ("mixer.ssm.dt_proj.kernel",), TRANSPOSED),
    Rule("mamba.dt_proj.0.bias", ("mixer.ssm.dt_bias",), SAME),
    Rule("mamba.A_log.0", ("mixer.ssm.A_log",), TRANSPOSED),
    Rule("mamba.D.0", ("mixer.ssm.D",), SAME),
    Rule("mamba.dt_layernorm.weight", ("mixer.ssm.dt_norm.scale",), SAME),
    Rule("mamba.B_layernorm.weight", ("mixer.ssm.B_norm.scale",), SAME),
    Rule("mamba.C_layernorm.weight", ("mixer.ssm.C_norm.scale",), SAME),
    Rule("mamba.pre_avg_layernorm1.weight", ("mixer.attention_norm.scale",), SAME),
    Rule("mamba.pre_avg_layernorm2.weight", ("mixer.ssm_norm.scale",), SAME),
)
_GATE_RULE = Rule("moe.experts.0.gate_proj.weight", ("mlp.gate_proj.kernel",), TRANSPOSED)


class ConversionError(HymbaError):
    """Weights that do not fit the architecture; lists every tensor that does not."""


def rules(config: HymbaConfig) -> tuple[tuple[Rule, ...], tuple[tuple[Rule, ...], ...]]:
    """The rules for what stands outside the layers, and for each layer.

    Raises:
      HymbaError: the released code, or its checkpoint, has no such architecture.
    """
    require_released_form(config)
    if config.attention.qk_norm != "none":
        raise ConversionError("no released checkpoint has query and key norms")
    meta = (_META_RULE,) if config.num_meta_tokens else ()
    head = () if config.tie_embeddings else (_HEAD_RULE,)
    gate = (_GATE_RULE,) if config.mlp_activation == "silu" else ()
    layers = tuple((_in_proj(spec), *_BLOCK_RULES, *gate) for spec in config.layer_specs)
    return (*_MODEL_RULES, *meta, *head), layers


def _in_proj(spec: LayerSpec) -> Rule:
    """query, key, value, SSM input, gate; without key and value where they are reused."""
    kv = () if spec.reuses_kv else _ATTENTION_KV
    ours = ("mixer.attention.query_proj.kernel", *kv, *_SSM_IN)
    return Rule("mamba.in_proj.weight", ours, TRANSPOSED)


def to_released(params: nnx.State, config: HymbaConfig, *, scan_layers: bool) -> dict[str, Array]:
    """Our parameters (or their gradients) under released names, in released layouts."""
    flat = {path: leaf[...] for path, leaf in nnx.to_flat_state(params)}
    return {
        name: _join(rule.layout, [_take(flat, place) for place in places])
        for name, rule, places in _placed_rules(config, scan_layers)
    }


def from_released(
    tensors: Mapping[str, Array | np.ndarray],
    params: nnx.State,
    config: HymbaConfig,
    *,
    scan_layers: bool,
) -> nnx.State:
    """Our parameters, from released tensors.

    Args:
      params: the parameters' shapes and dtypes, abstract or not.

    Raises:
      ConversionError: naming each tensor that is missing, left over or of another shape.
    """
    flat = dict(nnx.to_flat_state(params))
    shapes = jax.eval_shape(lambda p: to_released(p, config, scan_layers=scan_layers), params)
    problems = [f"{name} is missing" for name in shapes if name not in tensors]
    problems += [f"{name} is not part of this model" for name in tensors if name not in shapes]
    problems += [
        f"{name} has shape {tensors[name].shape}, not {shape.shape}"
        for name, shape in shapes.items()
        if name in tensors and tensors[name].shape != shape.shape
    ]
    if problems:
        raise ConversionError("the weights do not fit: " + "; ".join(problems))
    pieces: dict[Path, dict[int | None, Array]] = {path: {} for path in flat}
    for name, rule, places in _placed_rules(config, scan_layers):
        rest = jnp.asarray(tensors[name])
        for path, unit in places:
            stacked = flat[path].shape
            ours = jax.ShapeDtypeStruct(stacked if unit is None else stacked[1:], rest.dtype)
            rows = jax.eval_shape(rule.layout.to_released, ours).shape[0]
            pieces[path][unit] = rule.layout.to_ours(rest[:rows])
            rest = rest[rows:]
    arrays = {
        path: units[None] if None in units else jnp.stack([units[i] for i in sorted(units)])  # type: ignore[type-var]
        for path, units in pieces.items()
    }
    return nnx.from_flat_state(
        [(path, leaf.replace(arrays[path].astype(leaf.dtype))) for path, leaf in flat.items()]
    )


def _take(flat: FlatParams, place: Place) -> Array:
    path, unit = place
    return flat[path] if unit is None else flat[path][unit]


def _join(layout: Layout, parts: list[Array]) -> Array:
    return jnp.concatenate([layout.to_released(part) for part in parts])


def _placed_rules(
    config: HymbaConfig, scan_layers: bool
) -> Iterator[tuple[str, Rule, list[Place]]]:
    """Each released name, its rule, and the places of our arrays."""
    outside, layers = rules(config)
    for rule in outside:
        yield rule.released, rule, [(_path(name), None) for name in rule.ours]
    places = layer_places(config, scan_layers=scan_layers)
    for i, (place, layer_rules) in enumerate(zip(places, layers, strict=True)):
        for rule in layer_rules:
            sources = [((*place.block, *_path(name)), place.unit) for name in rule.ours]
            yield f"model.layers.{i}.{rule.released}", rule, sources


def _path(name: str) -> Path:
    return tuple(name.split("."))
