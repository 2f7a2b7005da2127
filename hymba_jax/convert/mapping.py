"""The one table between our parameters and the names of the released checkpoint.

A released tensor is made of one or more of our arrays: each brought to the released layout, then
laid one after the other along the first axis. Ours are kept apart where the released code splits
a product's result (`in_proj`), so that each part can be sharded by itself.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hymba_jax.config import ComputeConfig, HymbaConfig
from hymba_jax.convert.released_config import require_released_form
from hymba_jax.errors import HymbaError
from hymba_jax.layer_pattern import LayerSpec
from hymba_jax.model.hymba import Hymba, layer_places
from hymba_jax.types import Array

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
TIED_COPY = {HEAD: EMBEDDING}
"""A tensor that a checkpoint may hold twice: name to name."""

DTYPES = ("bfloat16", "float16", "float32")

type Path = tuple[Any, ...]
"""Names and numbers from the model to one of its parameters."""
type Index = tuple[slice, ...]


class ConversionError(HymbaError):
    """Weights that do not fit the architecture; lists every tensor that does not."""


class Layout(NamedTuple):
    """How an array of ours lies in the released checkpoint.

    Attributes:
      axes: for each axis there the one of ours, or None for an axis of size 1.
    """

    axes: tuple[int | None, ...]

    def to_released[A: (np.ndarray, Array)](self, array: A) -> A:
        """An array of ours as it lies there; a NumPy array's memory is shared."""
        order = [axis for axis in self.axes if axis is not None]
        return array.transpose(order)[tuple(None if a is None else slice(None) for a in self.axes)]

    def to_ours[A: (np.ndarray, Array)](self, array: A) -> A:
        """The way back."""
        order = np.argsort([axis for axis in self.axes if axis is not None]).tolist()
        return array[tuple(0 if a is None else slice(None) for a in self.axes)].transpose(order)

    def shape(self, ours: tuple[int, ...]) -> tuple[int, ...]:
        """The released shape of an array of this shape."""
        return tuple(1 if axis is None else ours[axis] for axis in self.axes)

    def released_index(self, ours: Index) -> Index:
        """Where a part of our array is in the released one."""
        return tuple(slice(None) if axis is None else ours[axis] for axis in self.axes)


VECTOR = Layout((0,))
SAME = Layout((0, 1))
TRANSPOSED = Layout((1, 0))  # linear weights are (out, in) there
CONV = Layout((1, None, 0))  # (channels, 1, kernel) there


class Rule(NamedTuple):
    """A released tensor and the arrays of ours that it is made of, in order."""

    released: str
    ours: tuple[str, ...]
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


class Piece(NamedTuple):
    """An array of ours, or one of its stack, and the rows of a released tensor that it is.

    Attributes:
      path: the parameter.
      unit: which of its stack; None where it is no stack.
      shape: of the array of ours, that of one of the stack.
      name: of the released tensor.
      start, stop: its rows along the tensor's first axis.
      layout: how it lies there.
    """

    path: Path
    unit: int | None
    shape: tuple[int, ...]
    name: str
    start: int
    stop: int
    layout: Layout

    @property
    def released_shape(self) -> tuple[int, ...]:
        """Shape of the piece as it lies in the released tensor."""
        return self.layout.shape(self.shape)


@runtime_checkable
class Tensor(Protocol):
    """What the table has to know of a tensor."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> Any: ...


def abstract_params(
    config: HymbaConfig, compute: ComputeConfig
) -> dict[Path, jax.ShapeDtypeStruct]:
    """Shape and dtype of each of a model's parameters, by path."""
    model = nnx.eval_shape(lambda: Hymba(config, compute, nnx.Rngs(0)))
    params = nnx.to_flat_state(nnx.state(model))
    return {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for path, leaf in params}


def param_shapes(config: HymbaConfig, *, scan_layers: bool) -> dict[Path, tuple[int, ...]]:
    """The shape of each of a model's parameters, by path."""
    params = abstract_params(config, ComputeConfig(scan_layers=scan_layers))
    return {path: like.shape for path, like in params.items()}


def pieces(
    shapes: Mapping[Path, tuple[int, ...]], config: HymbaConfig, *, scan_layers: bool
) -> list[Piece]:
    """Every parameter, cut into the pieces that released tensors are made of.

    Args:
      shapes: of all the model's parameters, by path.

    Raises:
      HymbaError: the released code has no such architecture.
      ConversionError: naming parameters that no rule takes, or more than one; and names that two
        rules give.
    """
    found, problems = [], []
    rows: Counter[str] = Counter()
    placed = [*_placed_rules(config, scan_layers)]
    names = Counter(name for name, _, _ in placed)
    problems += [f"{count} rules give {name}" for name, count in names.items() if count > 1]
    for name, layout, places in placed:
        for path, unit in places:
            if path not in shapes:
                problems.append(f"{name} has no parameter {dotted(path)} to go to")
                continue
            shape = shapes[path] if unit is None else shapes[path][1:]
            start, rows[name] = rows[name], rows[name] + layout.shape(shape)[0]
            found.append(Piece(path, unit, shape, name, start, rows[name], layout))
    takers = Counter((piece.path, piece.unit) for piece in found)
    problems += [
        f"{count} rules take {dotted(path)}" for (path, _), count in takers.items() if count > 1
    ]
    taken = {piece.path for piece in found}
    problems += [f"no rule takes {dotted(path)}" for path in shapes if path not in taken]
    if problems:
        raise ConversionError("the table does not fit the model: " + "; ".join(problems))
    return found


def released_shapes(found: list[Piece]) -> dict[str, tuple[int, ...]]:
    """The shape of each released tensor."""
    rows = {piece.name: piece.stop for piece in found}  # the last piece of each ends it
    return {piece.name: (rows[piece.name], *piece.released_shape[1:]) for piece in found}


def misfits(held: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Every tensor that is missing, left over, of another shape or a dtype that no Hymba has."""
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


def to_released(params: nnx.State, config: HymbaConfig, *, scan_layers: bool) -> dict[str, Array]:
    """Our parameters (or their gradients) under released names, in released layouts."""
    flat = {path: leaf[...] for path, leaf in nnx.to_flat_state(params)}
    parts = defaultdict(list)
    shapes = {path: array.shape for path, array in flat.items()}
    for piece in pieces(shapes, config, scan_layers=scan_layers):
        array = flat[piece.path] if piece.unit is None else flat[piece.path][piece.unit]
        parts[piece.name].append(piece.layout.to_released(array))
    return {name: jnp.concatenate(arrays) for name, arrays in parts.items()}


def from_released(
    tensors: Mapping[str, Array | np.ndarray],
    params: nnx.State,
    config: HymbaConfig,
    *,
    scan_layers: bool,
) -> nnx.State:
    """Our parameters, from released tensors that are in memory.

    Args:
      params: the parameters' shapes and dtypes, abstract or not.

    Raises:
      ConversionError: naming each tensor that is missing, left over or of another shape.
    """
    flat = dict(nnx.to_flat_state(params))
    shapes = {path: leaf.shape for path, leaf in flat.items()}
    found = pieces(shapes, config, scan_layers=scan_layers)
    if problems := misfits(tensors, released_shapes(found)):
        raise ConversionError("the weights do not fit: " + "; ".join(problems))
    arrays: dict[Path, dict[int | None, Array]] = defaultdict(dict)
    for piece in found:
        rows = jnp.asarray(tensors[piece.name])[piece.start : piece.stop]
        arrays[piece.path][piece.unit] = piece.layout.to_ours(rows)
    return nnx.from_flat_state(
        [
            (path, leaf.replace(_stacked(arrays[path]).astype(leaf.dtype)))
            for path, leaf in flat.items()
        ]
    )


def _stacked(units: dict[int | None, Array]) -> Array:
    """One array, of the units of a stack if there are any."""
    if None in units:
        return units[None]
    return jnp.stack([*units.values()])


def _placed_rules(
    config: HymbaConfig, scan_layers: bool
) -> Iterator[tuple[str, Layout, list[tuple[Path, int | None]]]]:
    """Each released name, its layout, and the places of our arrays."""
    outside, layers = rules(config)
    for rule in outside:
        yield rule.released, rule.layout, [(_path(name), None) for name in rule.ours]
    places = layer_places(config, scan_layers=scan_layers)
    for i, (place, layer_rules) in enumerate(zip(places, layers, strict=True)):
        for rule in layer_rules:
            sources = [((*place.block, *_path(name)), place.repeat) for name in rule.ours]
            yield f"model.layers.{i}.{rule.released}", rule.layout, sources


def _path(name: str) -> Path:
    return tuple(name.split("."))


def dotted(path: Path) -> str:
    """A parameter's path in words, such as groups.0.blocks.1.mlp_norm.scale."""
    return ".".join(map(str, path))
