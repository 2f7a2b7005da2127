"""The one table between native parameters and the tensors of an HF checkpoint.

An HF tensor consists of one or more native arrays, each in the HF layout, concatenated along the
first axis. Native arrays are separate where the HF implementation splits the result of a matmul
(`in_proj`), so that each can be sharded by itself.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from hymba_jax.checkpoint.checksums import dotted
from hymba_jax.config import HymbaConfig
from hymba_jax.config.layer_pattern import LayerSpec
from hymba_jax.convert.hf_config import require_hf_form
from hymba_jax.errors import HymbaError
from hymba_jax.model.abstract import ParamPath
from hymba_jax.model.hymba import layer_paths
from hymba_jax.types import Array

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
TIED_COPY = {HEAD: EMBEDDING}
"""Tied tensors, which a checkpoint may hold twice: name to name."""

DTYPES = ("bfloat16", "float16", "float32")

type Index = tuple[slice, ...]


class ConversionError(HymbaError):
    """Weights that do not fit the architecture; lists every tensor that does not."""


class Layout(NamedTuple):
    """How the axes of a native array are arranged in the HF checkpoint.

    Attributes:
      axes: for each HF axis the native one, or None for an axis of size 1.
    """

    axes: tuple[int | None, ...]

    def to_hf[A: (np.ndarray, Array)](self, array: A) -> A:
        """A native array in the HF layout; of a NumPy array a view."""
        order = [axis for axis in self.axes if axis is not None]
        return array.transpose(order)[tuple(None if a is None else slice(None) for a in self.axes)]

    def to_native[A: (np.ndarray, Array)](self, array: A) -> A:
        """The inverse of `to_hf`."""
        order = np.argsort([axis for axis in self.axes if axis is not None]).tolist()
        return array[tuple(0 if a is None else slice(None) for a in self.axes)].transpose(order)

    def hf_shape(self, native: tuple[int, ...]) -> tuple[int, ...]:
        """The HF shape of an array of this native shape."""
        return tuple(1 if axis is None else native[axis] for axis in self.axes)

    def hf_index(self, native: Index) -> Index:
        """The index into the HF array for this one into the native array."""
        return tuple(slice(None) if axis is None else native[axis] for axis in self.axes)


VECTOR = Layout((0,))
SAME = Layout((0, 1))
TRANSPOSED = Layout((1, 0))  # linear weights are (out, in) in HF
CONV = Layout((1, None, 0))  # (channels, 1, kernel) in HF


class Rule(NamedTuple):
    """An HF tensor and the native arrays that it is the concatenation of."""

    hf: str
    native: tuple[str, ...]
    layout: Layout


_ATTENTION_KV = ("mixer.attention.key_proj.kernel", "mixer.attention.value_proj.kernel")
_SSM_IN = ("mixer.ssm.in_proj.kernel", "mixer.ssm.gate_proj.kernel")

_MODEL_RULES = (
    Rule(EMBEDDING, ("embedding",), SAME),
    Rule("model.final_layernorm.weight", ("final_norm.scale",), VECTOR),
)
_META_RULE = Rule("model.memory_tokens", ("meta_tokens",), SAME)
_HEAD_RULE = Rule(HEAD, ("lm_head.kernel",), TRANSPOSED)
_BLOCK_RULES = (
    Rule("input_layernorm.weight", ("mixer_norm.scale",), VECTOR),
    Rule("mamba.out_proj.weight", ("mixer.out_proj.kernel",), TRANSPOSED),
    Rule("pre_moe_layernorm.weight", ("mlp_norm.scale",), VECTOR),
    Rule("moe.experts.0.up_proj.weight", ("mlp.up_proj.kernel",), TRANSPOSED),
    Rule("moe.experts.0.down_proj.weight", ("mlp.down_proj.kernel",), TRANSPOSED),
    Rule("mamba.conv1d.weight", ("mixer.ssm.conv_kernel",), CONV),
    Rule("mamba.conv1d.bias", ("mixer.ssm.conv_bias",), VECTOR),
    Rule("mamba.x_proj.0.weight", ("mixer.ssm.x_proj.kernel",), TRANSPOSED),
    Rule("mamba.dt_proj.0.weight", ("mixer.ssm.dt_proj.kernel",), TRANSPOSED),
    Rule("mamba.dt_proj.0.bias", ("mixer.ssm.dt_bias",), VECTOR),
    Rule("mamba.A_log.0", ("mixer.ssm.A_log",), TRANSPOSED),
    Rule("mamba.D.0", ("mixer.ssm.D",), VECTOR),
    Rule("mamba.dt_layernorm.weight", ("mixer.ssm.dt_norm.scale",), VECTOR),
    Rule("mamba.B_layernorm.weight", ("mixer.ssm.B_norm.scale",), VECTOR),
    Rule("mamba.C_layernorm.weight", ("mixer.ssm.C_norm.scale",), VECTOR),
    Rule("mamba.pre_avg_layernorm1.weight", ("mixer.attention_norm.scale",), VECTOR),
    Rule("mamba.pre_avg_layernorm2.weight", ("mixer.ssm_norm.scale",), VECTOR),
)
_GATE_RULE = Rule("moe.experts.0.gate_proj.weight", ("mlp.gate_proj.kernel",), TRANSPOSED)


def rules(config: HymbaConfig) -> tuple[tuple[Rule, ...], tuple[tuple[Rule, ...], ...]]:
    """The rules for parameters outside the layers, and for each layer.

    Raises:
      HymbaError: the HF implementation has no such architecture.
    """
    require_hf_form(config)
    if config.attention.qk_norm != "none":
        raise ConversionError("no HF checkpoint has query and key norms")
    meta = (_META_RULE,) if config.num_meta_tokens else ()
    head = () if config.tie_embeddings else (_HEAD_RULE,)
    gate = (_GATE_RULE,) if config.mlp_activation == "silu" else ()
    layers = tuple((_in_proj(spec), *_BLOCK_RULES, *gate) for spec in config.layer_specs)
    return (*_MODEL_RULES, *meta, *head), layers


def _in_proj(spec: LayerSpec) -> Rule:
    """query, key, value, SSM input, gate; without key and value where they are reused."""
    kv = () if spec.reuses_kv else _ATTENTION_KV
    native = ("mixer.attention.query_proj.kernel", *kv, *_SSM_IN)
    return Rule("mamba.in_proj.weight", native, TRANSPOSED)


class HFSlice(NamedTuple):
    """The rows of an HF tensor that are one native array, or one layer of a stacked array.

    Attributes:
      path: the native parameter.
      stack_index: which layer of the stacked array; None where it is not stacked.
      shape: of the native array, of one layer where it is stacked.
      name: of the HF tensor.
      start, stop: the rows, along the HF tensor's first axis.
      layout: of the rows.
    """

    path: ParamPath
    stack_index: int | None
    shape: tuple[int, ...]
    name: str
    start: int
    stop: int
    layout: Layout

    @property
    def hf_shape(self) -> tuple[int, ...]:
        """Shape of the rows."""
        return self.layout.hf_shape(self.shape)

    def to_hf[A: (np.ndarray, Array)](self, array: A) -> A:
        """The rows, of the whole native array; of a NumPy array a view."""
        return self.layout.to_hf(array if self.stack_index is None else array[self.stack_index])


@runtime_checkable
class Tensor(Protocol):
    """Shape and dtype of a tensor, whatever holds it."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> Any: ...


def hf_slices(
    shapes: Mapping[ParamPath, tuple[int, ...]], config: HymbaConfig, *, scan_layers: bool
) -> list[HFSlice]:
    """Every parameter as the rows of HF tensors, in the tensors' order.

    Args:
      shapes: of all the model's parameters, by path.

    Raises:
      HymbaError: the HF implementation has no such architecture.
      ConversionError: naming parameters that are not matched by exactly one rule, and tensors that
        several rules produce.
    """
    found, problems = [], []
    rows: Counter[str] = Counter()
    placed = [*_placed_rules(config, scan_layers)]
    names = Counter(name for name, _, _ in placed)
    problems += [f"{count} rules produce {name}" for name, count in names.items() if count > 1]
    for name, layout, places in placed:
        for path, index in places:
            if path not in shapes:
                problems.append(f"{name} has no parameter {dotted(path)} in this model")
                continue
            shape = shapes[path] if index is None else shapes[path][1:]
            start, rows[name] = rows[name], rows[name] + layout.hf_shape(shape)[0]
            found.append(HFSlice(path, index, shape, name, start, rows[name], layout))
    takers = Counter((part.path, part.stack_index) for part in found)
    problems += [
        f"{count} rules match {dotted(path)}" for (path, _), count in takers.items() if count > 1
    ]
    taken = {part.path for part in found}
    problems += [f"no rule matches {dotted(path)}" for path in shapes if path not in taken]
    if problems:
        raise ConversionError("the table does not fit the model: " + "; ".join(problems))
    return found


def hf_shapes(parts: list[HFSlice]) -> dict[str, tuple[int, ...]]:
    """The shape of each HF tensor, by name."""
    rows = {part.name: part.stop for part in parts}  # the last slice of each ends it
    return {part.name: (rows[part.name], *part.hf_shape[1:]) for part in parts}


def mismatches(held: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Every tensor that is missing, unexpected, of another shape or an unsupported dtype."""
    problems = [f"{name} is missing" for name in shapes if name not in held]
    problems += [f"{name} is not part of this model" for name in held if name not in shapes]
    problems += [
        f"{name} has shape {held[name].shape}, not {shape}"
        for name, shape in shapes.items()
        if name in held and held[name].shape != shape
    ]
    problems += [
        f"{name} has dtype {tensor.dtype}, not bfloat16, float16 or float32"
        for name, tensor in held.items()
        if tensor.dtype not in DTYPES
    ]
    return problems


def _placed_rules(
    config: HymbaConfig, scan_layers: bool
) -> Iterator[tuple[str, Layout, list[tuple[ParamPath, int | None]]]]:
    """Each HF name, its layout, and the native arrays, with their index where they are stacked."""
    outside, layers = rules(config)
    for rule in outside:
        yield rule.hf, rule.layout, [(_path(name), None) for name in rule.native]
    places = layer_paths(config, scan_layers=scan_layers)
    for i, (place, layer_rules) in enumerate(zip(places, layers, strict=True)):
        for rule in layer_rules:
            sources = [((*place.path, *_path(name)), place.stack_index) for name in rule.native]
            yield f"model.layers.{i}.{rule.hf}", rule.layout, sources


def _path(name: str) -> ParamPath:
    return tuple(name.split("."))
