"""Memory of models, caches and training states, from the code that allocates them; and whether it
is there: `hymba memory`, and what inference checks before it allocates."""

import contextlib
import dataclasses
import functools
import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from rich.console import Console
from rich.table import Table

from hymba_jax.config import PRESETS, ComputeConfig, DType, HymbaConfig
from hymba_jax.errors import HymbaError
from hymba_jax.model import Hymba
from hymba_jax.run_config import read_model
from hymba_jax.training.config import TrainingConfig
from hymba_jax.training.optimizer import make_optimizer

GB = 10**9
LARGEST = 2**31 - 1  # positions and rows are 32-bit numbers
CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


@dataclass(frozen=True)
class MemoryConfig:
    """Prints the memory that a model needs to generate and to be trained. Nothing is allocated.

    Attributes:
      preset: hymba-125m, hymba-350m or hymba-1.5b.
      config: TOML file of a run or a model, in place of a preset.
      context: tokens that a sequence may grow to.
      batch: sequences at a time.
      dtype: of parameters, keys, values and states in inference.
      state_dtype: of the SSM's states, where it is another; generating keeps float32 ones unless
        told otherwise.
      param_dtype: of parameters and gradients in training; that of the config, or of a preset
        float32, if absent.
    """

    preset: str = ""
    config: str = ""
    context: int = 8192
    batch: int = 1
    dtype: DType = "bfloat16"
    state_dtype: DType | None = None
    param_dtype: DType | None = None


@dataclass(frozen=True)
class CacheBytes:
    """Bytes of one sequence's cache, by what they are for."""

    global_kv: int
    window_kv: int
    conv_inputs: int
    ssm_states: int

    @property
    def total(self) -> int:
        return sum(dataclasses.astuple(self))


@dataclass(frozen=True)
class TrainingBytes:
    """Bytes of a training state, by what they are for; activations are not counted."""

    params: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        return sum(dataclasses.astuple(self))


def main(args: MemoryConfig) -> None:
    """Prints a table.

    Raises:
      HymbaError: there is no such model, or a size is impossible.
    """
    config, compute = _architecture(args)
    for name, size in (("context", args.context), ("batch", args.batch)):
        if not 1 <= size <= LARGEST:
            raise HymbaError(f"{name} is {size}, not between 1 and {LARGEST}, a 32-bit number")
    state_dtype = args.state_dtype or args.dtype
    param_dtype = args.param_dtype or compute.param_dtype
    cache = cache_bytes(config, args.context, args.dtype, state_dtype)
    meta = meta_state_bytes(config, args.dtype)
    params = param_bytes(config, args.dtype)
    training = training_bytes(config, param_dtype)
    table = Table(
        title=f"{args.preset or args.config}, sequences of {args.context} tokens",
        caption="training: without activations, which depend on batch, length and remat",
    )
    table.add_column("GB")
    for name in ("one sequence", f"{args.batch} sequences", "training"):
        table.add_column(name, justify="right")
    kv = args.dtype
    for name, size in (
        (f"global KV, {kv}", cache.global_kv),
        (f"window KV, {kv}", cache.window_kv),
        (f"conv inputs, {kv}", cache.conv_inputs),
        (f"SSM states, {state_dtype}", cache.ssm_states),
        ("cache", cache.total),
    ):
        table.add_row(name, gb(size), gb(size * args.batch), "", end_section=name == "cache")
    for name, size in (
        ("meta tokens, global KV", meta.global_kv),
        ("meta tokens, all else", meta.total - meta.global_kv),
        (f"parameters, {args.dtype}", params),
    ):
        table.add_row(name, gb(size), gb(size), "")
    table.add_section()
    for name, size in (
        (f"trained parameters, {param_dtype}", training.params),
        (f"gradients, {param_dtype}", training.gradients),
        ("optimizer state, AdamW", training.optimizer),
    ):
        table.add_row(name, "", "", gb(size))
    fixed = params + meta.total
    table.add_section()
    table.add_row(
        "in all", *map(gb, (fixed + cache.total, fixed + cache.total * args.batch, training.total))
    )
    Console().print(table)


@functools.lru_cache
def cache_bytes(config: HymbaConfig, context: int, dtype: DType, state_dtype: DType) -> CacheBytes:
    """The state of one sequence."""
    model = _abstract_model(config, dtype)
    return _by_use(config, jax.eval_shape(lambda: model.init_state(1, context, state_dtype)).layers)


@functools.lru_cache
def meta_state_bytes(config: HymbaConfig, dtype: DType) -> CacheBytes:
    """The state after the meta tokens, held once for all sequences."""
    graph, params = nnx.split(_abstract_model(config, dtype))
    return _by_use(
        config, jax.eval_shape(lambda params: nnx.merge(graph, params).meta_state(), params)
    )


def param_bytes(config: HymbaConfig, dtype: DType) -> int:
    """The parameters."""
    return tree_bytes(_params(config, dtype))


def training_bytes(config: HymbaConfig, param_dtype: DType) -> TrainingBytes:
    """What a training state allocates, and its gradients."""
    params = _params(config, param_dtype)
    optimizer = make_optimizer(TrainingConfig())
    size = tree_bytes(params)
    return TrainingBytes(size, size, tree_bytes(jax.eval_shape(optimizer.init, params)))


def tree_bytes(tree: Any) -> int:
    """Bytes of the arrays of a tree, or of what they would be."""
    return sum(leaf.size * jnp.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree))


def check_fits(what: str, size: int, devices: Collection[jax.Device], advice: str) -> None:
    """Refuses what is larger than all memory of its devices, before it is allocated.

    What is smaller may still be too large: other arrays and temporaries are not counted.

    Args:
      what: the subject of the message.
      size: bytes, of all devices together.

    Raises:
      HymbaError: it does not fit.
    """
    own = next(device for device in devices if device.process_index == jax.process_index())
    available = device_memory(own)
    if available is not None and size > available * len(devices):
        raise HymbaError(
            f"{what}: {gb(size)} GB, and {own.device_kind} has {gb(available * len(devices))} GB "
            f"of memory: {advice}"
        )


def device_memory(device: jax.Device) -> int | None:
    """Bytes that JAX may use of a device, for the CPU all of its host; None if it is not said."""
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        return int(stats["bytes_limit"])
    return host_memory() if device.platform == "cpu" else None


def host_memory() -> int:
    """Bytes of the machine's memory, or of its container's if that has a limit."""
    size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for path in CGROUP_LIMITS:
        with contextlib.suppress(OSError, ValueError):  # not there, or "max"
            size = min(size, int(Path(path).read_text()))
    return size


def gb(size: int) -> str:
    """Bytes as GB (10**9), with three digits that count."""
    decimals = max(0, 12 - len(str(size))) if size else 0
    return f"{size / GB:,.{decimals}f}"


def _params(config: HymbaConfig, dtype: DType) -> Any:
    """The parameters without their values."""
    return nnx.to_pure_dict(nnx.state(_abstract_model(config, dtype)))


def _abstract_model(config: HymbaConfig, dtype: DType) -> Hymba:
    compute = ComputeConfig(dtype=dtype, param_dtype=dtype, scan_layers=False)
    return nnx.eval_shape(lambda: Hymba(config, compute, nnx.Rngs(0)))


def _by_use(config: HymbaConfig, layers: Any) -> CacheBytes:
    kv = {"global": 0, "window": 0}
    for spec, layer in zip(config.layer_specs, layers, strict=True):
        if spec.attention is not None:
            kv[spec.attention] += tree_bytes(layer.kv)
    return CacheBytes(
        global_kv=kv["global"],
        window_kv=kv["window"],
        conv_inputs=sum(tree_bytes(layer.ssm.conv_inputs) for layer in layers if layer.ssm),
        ssm_states=sum(tree_bytes(layer.ssm.ssm_state) for layer in layers if layer.ssm),
    )


def _architecture(args: MemoryConfig) -> tuple[HymbaConfig, ComputeConfig]:
    if bool(args.preset) == bool(args.config):
        raise HymbaError(f"name either a preset or a config; presets are {', '.join(PRESETS)}")
    if args.config:
        return read_model(args.config)
    if args.preset not in PRESETS:
        raise HymbaError(f"preset is {args.preset!r}, not one of {', '.join(PRESETS)}")
    return PRESETS[args.preset], ComputeConfig()
