"""Adapters in the format of the peft library, with the names of the HF checkpoint's modules.

    adapter_config.json         rank, alpha and kind
    tokenizer.json, ...         with the chat template that it was trained by
    adapter_model.safetensors   base_model.model.MODULE.lora_A.weight         (rank, in)
                                base_model.model.MODULE.lora_B.weight         (out, rank)
                                base_model.model.MODULE.lora_magnitude_vector (out,), of DoRA

`in_proj` is one module there and several linear maps here (`mapping.py`). An adapter of it is read
as adapters of each with the same A and their rows of B. Adapters of several are written as one in
exact block form: the matrices A above one another, and a block-diagonal B.
"""

import json
import re
import zlib
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import save_file

from hymba_jax.config import HymbaConfig
from hymba_jax.config.adapter import AdapterConfig
from hymba_jax.config.field_types import leaves, shown
from hymba_jax.convert.mapping import HFSlice, hf_slices
from hymba_jax.convert.tensor_file import TensorFile
from hymba_jax.errors import HymbaError
from hymba_jax.files import parse_json_object, read_json
from hymba_jax.hf_files import ADAPTER_CONFIG
from hymba_jax.model import Hymba
from hymba_jax.model.abstract import ParamPath, Params
from hymba_jax.model.lora import LowRankUpdate, column_norms
from hymba_jax.model.trainable import ADAPTER
from hymba_jax.tokenizer import Tokenizer
from hymba_jax.types import Array

WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_BASE, _BASE_CONFIG = "base_checksum", "base_config"  # in the metadata of the weights
_TENSOR = re.compile(
    r"base_model\.model\.(.+)\.(lora_A\.weight|lora_B\.weight|lora_magnitude_vector)(?:\.weight)?"
)

# Options that say how an adapter was made, not what it computes.
_HARMLESS = frozenset(
    {
        *("auto_mapping", "base_model_name_or_path", "eva_config", "exclude_modules"),
        *("inference_mode", "layers_pattern", "layers_to_transform", "lora_dropout"),
        *("megatron_core", "peft_version", "qalora_group_size", "revision", "target_modules"),
        "task_type",
    }
)
_READ = frozenset(
    {"peft_type", "r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern"}
)
_INITIALIZATIONS = (True, False, "gaussian", "eva", "orthogonal")  # which leave the base as it is


def merge_peft(directory: Path, model: Hymba) -> Hymba:
    """The model with the adapter of a directory merged into its kernels.

    Raises:
      HymbaError: it cannot be read, has options that are not supported, or belongs to another
        model.
    """
    adapters, metadata = read_peft(directory)
    graph, state = nnx.split(model)
    params = flatten_dict(nnx.to_pure_dict(state))
    shapes = {path: leaf.shape for path, leaf in params.items()}
    parts = _kernels(shapes, model.config, scan_layers=model.compute.scan_layers)
    _check_fit(directory, adapters, parts)
    if metadata.get(_BASE, own := _checksum(params, parts[min(adapters)])) != own:
        raise HymbaError(
            f"{directory}: belongs to another model than this one, or is merged into it already: "
            "name the model that it was trained on"
        )
    _check_config(directory, metadata, model.config)
    updates: dict[ParamPath, dict[int | None, LowRankUpdate]] = defaultdict(dict)
    for module, update in adapters.items():
        for part in parts[module]:
            updates[part.path][part.stack_index] = _rows(update, part)
    for path, layers in updates.items():
        params[path] = _merged(params[path], layers)
    return nnx.merge(graph, unflatten_dict(params))


def _merged(kernel: Array, updates: Mapping[int | None, LowRankUpdate]) -> Array:
    """A kernel, or those of stacked layers, with the updates of some of them."""
    if None in updates:
        return updates[None].merged(kernel)
    layers = (updates[i].merged(w) if i in updates else w for i, w in enumerate(kernel))
    return jnp.stack([*layers])


def peft_tokenizer(directory: Path, base: Tokenizer, config: HymbaConfig) -> Tokenizer:
    """The tokenizer beside an adapter, if it has a chat template; else that of the base.

    Args:
      config: of the base.

    Raises:
      HymbaError: it cannot be read, gives text other ids than the base's, or does not fit.
    """
    if not (directory / "tokenizer.json").is_file():
        return base
    own = Tokenizer.load(directory)
    if not own.chat_templates:
        return base
    if not own.extends(base):
        raise HymbaError(
            f"{directory}: its tokenizer gives text other ids than that of the model: name the "
            "model that it was trained on, or remove tokenizer.json there to use the model's"
        )
    own.check_fits(config, str(directory))
    return own


def read_peft(directory: Path) -> tuple[dict[str, LowRankUpdate], dict[str, str]]:
    """The adapter of each HF module, its arrays transposed to (in, out), and the file's metadata.

    Raises:
      HymbaError: a file cannot be read, or has options or tensors that are not supported.
    """
    if not (directory / ADAPTER_CONFIG).is_file():
        raise HymbaError(
            f"{directory}: no PEFT adapter, {ADAPTER_CONFIG} is missing; hymba export RUN "
            "DIRECTORY --adapter writes that of a run"
        )
    settings, file = _read_settings(directory / ADAPTER_CONFIG), TensorFile(directory / WEIGHTS)
    tensors: dict[str, dict[str, np.ndarray]] = defaultdict(dict)
    problems = []
    for name in file.tensors:
        if match := _TENSOR.fullmatch(name):
            tensors[match[1]][match[2].removesuffix(".weight")] = file.read(name)
        else:
            problems.append(f"{name} is no LoRA or DoRA of a linear map")
    adapters = {}
    for module, held in tensors.items():
        try:
            adapters[module] = _module_update(settings, module, held)
        except ValueError as error:
            problems.append(f"{module} {error}")
    if problems or not adapters:
        raise HymbaError(f"{file.path}: {'; '.join(problems) or 'has no adapter'}")
    return adapters, file.metadata


def _module_update(
    settings: Mapping[str, Any], module: str, tensors: Mapping[str, np.ndarray]
) -> LowRankUpdate:
    """The adapter of an HF module. Raises ValueError if its tensors do not fit the options."""
    names = ["lora_A", "lora_B"] + ["lora_magnitude_vector"] * settings["use_dora"]
    if sorted(tensors) != names:
        raise ValueError(f"has {', '.join(sorted(tensors))}, not {', '.join(names)}")
    rank = _of_pattern(settings["rank_pattern"], module, settings["r"])
    alpha = _of_pattern(settings["alpha_pattern"], module, settings["lora_alpha"])
    A, B, *magnitude = (jnp.asarray(tensors[name], jnp.float32) for name in names)
    if (A.ndim, B.ndim) != (2, 2) or not len(A) == B.shape[1] == rank:
        raise ValueError(f"has shapes {A.shape} and {B.shape}, not of rank {rank}")
    if any(m.size != len(B) for m in magnitude):
        raise ValueError(f"has {magnitude[0].size} magnitudes of {len(B)} outputs")
    scale = alpha / (rank**0.5 if settings["use_rslora"] else rank)
    return LowRankUpdate(A.T, B.T, scale, *(m.ravel() for m in magnitude))


def write_peft(
    directory: Path,
    params: Params,
    config: HymbaConfig,
    adapter: AdapterConfig,
    *,
    scan_layers: bool,
    base_model: str,
) -> None:
    """Writes the adapter among a model's parameters into an existing directory.

    Args:
      base_model: name of the model that it belongs to.

    Raises:
      HymbaError: parameters of the model itself were trained, or HF checkpoints have no such
        architecture.
    """
    if adapter.train:
        raise HymbaError(
            f"the run trained {' '.join(adapter.train)} of the model itself (adapter.train), for "
            "which PEFT adapters have no place: export with --merge"
        )
    flat = {path: np.asarray(leaf) for path, leaf in flatten_dict(params).items()}
    shapes = {path: leaf.shape for path, leaf in flat.items() if ADAPTER not in path}
    tensors: dict[str, np.ndarray] = {}
    ranks: dict[str, int] = {}
    parts = _kernels(shapes, config, scan_layers=scan_layers)
    for module, several in parts.items():
        updates = [_update(flat, part, adapter) for part in several]
        if any(update is not None for update in updates):
            blocks = _block_form(flat, several, updates)
            ranks[module] = len(blocks["lora_A.weight"])
            tensors |= {f"{_PREFIX}{module}.{name}": array for name, array in blocks.items()}
    settings = _settings(adapter, ranks, [*parts], base_model)
    (directory / ADAPTER_CONFIG).write_text(json.dumps(settings, indent=2) + "\n")
    metadata = {
        "format": "pt",
        _BASE: _checksum(flat, parts[min(ranks)]),
        _BASE_CONFIG: json.dumps(dict(leaves(config.resolved(), "model."))),
    }
    save_file(tensors, directory / WEIGHTS, metadata)


def _block_form(
    flat: Mapping[ParamPath, np.ndarray],
    parts: list[HFSlice],
    updates: list[LowRankUpdate | None],
) -> dict[str, np.ndarray]:
    """One adapter of an HF module, of those of the kernels that it consists of."""
    present = [update for update in updates if update is not None]
    # The safetensors library writes memory as it lies: in C order.
    A = np.ascontiguousarray(np.concatenate([np.asarray(update.A).T for update in present]))
    B = np.zeros((parts[-1].stop, len(A)), np.float32)
    magnitudes, column = [], 0
    for part, update in zip(parts, updates, strict=True):
        if update is not None:
            rank = update.B.shape[0]
            B[part.start : part.stop, column : column + rank] = np.asarray(update.B).T
            column += rank
        if update is None or update.magnitude is None:  # of a kernel that stays as it is
            kernel = _layer(flat[part.path], part)
            magnitudes.append(np.asarray(column_norms(jnp.asarray(kernel))))
        else:
            magnitudes.append(np.asarray(update.magnitude))
    tensors = {"lora_A.weight": A, "lora_B.weight": B}
    if present[0].magnitude is not None:
        tensors["lora_magnitude_vector"] = np.concatenate(magnitudes)
    return tensors


def _update(
    flat: Mapping[ParamPath, np.ndarray], part: HFSlice, adapter: AdapterConfig
) -> LowRankUpdate | None:
    """The adapter of a kernel; None if it has none."""
    place = (*part.path[:-1], ADAPTER)
    if (*place, "A", "kernel") not in flat:
        return None
    magnitude = flat.get((*place, "magnitude"))
    return LowRankUpdate(
        jnp.asarray(_layer(flat[*place, "A", "kernel"], part)),
        jnp.asarray(_layer(flat[*place, "B", "kernel"], part)),
        adapter.scale,
        None if magnitude is None else jnp.asarray(_layer(magnitude, part)),
    )


def _layer(array: np.ndarray, part: HFSlice) -> np.ndarray:
    return array if part.stack_index is None else array[part.stack_index]


def _rows(update: LowRankUpdate, part: HFSlice) -> LowRankUpdate:
    """The part of an HF module's adapter that is of one kernel."""
    rows = slice(part.start, part.stop)
    magnitude = None if update.magnitude is None else update.magnitude[rows]
    return update._replace(B=update.B[:, rows], magnitude=magnitude)


def _kernels(
    shapes: Mapping[ParamPath, tuple[int, ...]], config: HymbaConfig, *, scan_layers: bool
) -> dict[str, list[HFSlice]]:
    """The kernels that each linear HF module consists of, by the module's name."""
    modules: dict[str, list[HFSlice]] = defaultdict(list)
    for part in hf_slices(shapes, config, scan_layers=scan_layers):
        if part.path[-1] == "kernel":
            modules[_module(part)].append(part)
    return dict(modules)


def _module(part: HFSlice) -> str:
    return part.name.removesuffix(".weight")


def _check_fit(
    directory: Path,
    adapters: Mapping[str, LowRankUpdate],
    parts: Mapping[str, list[HFSlice]],
) -> None:
    """Raises HymbaError naming every adapter that is not of a linear map of this model."""
    problems = []
    for module, update in adapters.items():
        if module not in parts:
            problems.append(f"{module} is no linear map of this model")
            continue
        maps = update.A.shape[0], update.B.shape[1]
        wanted = parts[module][0].shape[0], parts[module][-1].stop
        if maps != wanted:
            problems.append(
                f"{module} maps {maps[0]} to {maps[1]} there, {wanted[0]} to {wanted[1]} here"
            )
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise HymbaError(
            f"{directory}: the adapter belongs to another model ({'; '.join(problems[:3])}{more})"
        )


def _check_config(directory: Path, metadata: Mapping[str, str], config: HymbaConfig) -> None:
    """Raises HymbaError if the adapter was trained on a model that computes in another way.

    Windows and the base of RoPE, say, are in no parameter.
    """
    try:
        there = parse_json_object(metadata.get(_BASE_CONFIG, "{}"))
    except ValueError as error:
        raise HymbaError(
            f"{directory / WEIGHTS}: its {_BASE_CONFIG} is broken ({error}): export it again"
        ) from error
    unused = {"model.pad_token_id"}
    unused |= {"model.max_positions"} if config.rope_type != "ntk" else set()
    unused |= (
        {"model.attention.rope_original_positions"} if config.rope_type == "default" else set()
    )
    differences = [
        f"{name} is {shown(there[name])} there, {shown(value)} here"
        for name, value in leaves(config.resolved(), "model.")
        if name not in unused and there.get(name, value) != value
    ]
    if differences:
        raise HymbaError(
            f"{directory}: was trained on a model that computes in another way "
            f"({'; '.join(differences)}): name one with those values, or export the run with "
            "--merge"
        )


def _read_settings(path: Path) -> dict[str, Any]:
    """The options of an adapter, which have all those of `_READ`.

    Raises:
      HymbaError: naming every option that would change what the adapter computes.
    """
    settings = {
        "use_rslora": False,
        "use_dora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        **read_json(path),
    }
    problems = [*_setting_problems(settings)]
    if problems:
        raise HymbaError(f"{path}: " + "; ".join(problems))
    return settings


def _setting_problems(settings: Mapping[str, Any]) -> Iterator[str]:
    if settings.get("peft_type") != "LORA":
        yield f"peft_type is {shown(settings.get('peft_type'))}, and only LORA is supported"
    patterns = [settings["rank_pattern"] or {}, settings["alpha_pattern"] or {}]
    if not all(isinstance(pattern, dict) for pattern in patterns):
        yield "rank_pattern and alpha_pattern have to be objects"
        patterns = []
    for name, at_least in (("r", 1), ("lora_alpha", 0)):
        values = [settings.get(name), *(patterns.pop(0).values() if patterns else ())]
        if any(type(value) not in (int, float) or value < at_least for value in values):
            yield f"{name} and its pattern have {shown(values)}, not numbers from {at_least}"
    for name in ("use_rslora", "use_dora"):
        if type(settings[name]) is not bool:
            yield f"{name} is {shown(settings[name])}, not true or false"
    if settings.get("init_lora_weights", True) not in _INITIALIZATIONS:
        yield (
            f"init_lora_weights is {shown(settings['init_lora_weights'])}, which changes the base "
            "model: convert it to plain LoRA with peft (path_initial_model_for_weight_conversion)"
        )
    for name, value in settings.items():
        known = name in _HARMLESS or name in _READ or name == "init_lora_weights"
        if not known and value not in (None, False, "none", {}, []):
            yield f"{name} is {shown(value)}, which is not supported"


def _of_pattern[T](pattern: Mapping[str, T] | None, module: str, default: T) -> T:
    """The value for a module, found as peft finds it. Raises ValueError if a pattern is none."""
    for key, value in (pattern or {}).items():
        try:
            found = re.match(rf"(.*\.)?({key})$", module)
        except re.error as error:
            raise ValueError(f"has the pattern {key!r}, which is none ({error})") from error
        if found:
            return value
    return default


def _settings(
    adapter: AdapterConfig, ranks: Mapping[str, int], modules: list[str], base_model: str
) -> dict[str, Any]:
    """The content of the config for modules of these ranks.

    Args:
      modules: all linear maps of the model.
    """

    def short(module: str) -> str:
        return re.sub(r".*layers\.\d+\.", "", module)

    whole = {short(module) for module in ranks} - {short(m) for m in modules if m not in ranks}
    targets = {short(module) if short(module) in whole else module for module in ranks}
    others = {module: rank for module, rank in ranks.items() if rank != adapter.rank}
    power = 0.5 if adapter.kind == "rslora" else 1
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": adapter.rank,
        "lora_alpha": adapter.alpha,
        "lora_dropout": adapter.dropout,
        "use_rslora": adapter.kind == "rslora",
        "use_dora": adapter.kind == "dora",
        "target_modules": sorted(targets),
        "rank_pattern": others,
        "alpha_pattern": {
            module: adapter.alpha * (rank / adapter.rank) ** power
            for module, rank in others.items()
        },
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
    }


def _checksum(params: Mapping[ParamPath, Any], parts: list[HFSlice]) -> str:
    """Of a base model: its embedding, and the kernels of a module that the adapter changes.

    They are rounded to bfloat16, so that it is the same in whatever dtype they are loaded.
    """
    checksum = 0
    for array in (params["embedding",], *(_layer(params[part.path], part) for part in parts)):
        rounded = np.ascontiguousarray(np.asarray(array).astype(ml_dtypes.bfloat16))
        checksum = zlib.crc32(rounded.view(np.uint16), checksum)
    return f"{checksum:08x}"
