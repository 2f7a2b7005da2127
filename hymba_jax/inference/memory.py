"""`hymba memory`: what a model and its cache weigh, from the code that allocates them."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from rich.console import Console
from rich.table import Table

from hymba_jax.config import PRESETS, ComputeConfig, DType, HymbaConfig
from hymba_jax.errors import HymbaError
from hymba_jax.model import Hymba
from hymba_jax.model.cache import empty_cache, empty_prefix
from hymba_jax.run_config import read_model

MB = 10**6


@dataclass(frozen=True)
class MemoryConfig:
    """Prints what a model and its cache weigh. Nothing is allocated.

    Attributes:
      preset: one of the family.
      config: TOML file of a run or a model, in place of a preset.
      context: tokens that a text may grow to.
      batch: texts at a time.
      dtype: of parameters, keys, values and states.
      state_dtype: of the SSM's states, where it is another; generating keeps float32 ones unless
        told otherwise.
    """

    preset: str = ""
    config: str = ""
    context: int = 8192
    batch: int = 1
    dtype: DType = "bfloat16"
    state_dtype: DType | None = None


@dataclass(frozen=True)
class CacheBytes:
    """Bytes that one text's cache holds, by what they are for."""

    global_kv: int
    window_kv: int
    conv_inputs: int
    ssm_states: int

    @property
    def total(self) -> int:
        return sum(dataclasses.astuple(self))


def main(args: MemoryConfig) -> None:
    """Prints a table.

    Raises:
      HymbaError: there is no such model, or a size is impossible.
    """
    config = _architecture(args)
    if args.context < 1 or args.batch < 1:
        raise HymbaError(f"context {args.context} and batch {args.batch}: both are at least 1")
    state_dtype = args.state_dtype or args.dtype
    text = cache_bytes(config, args.context, args.dtype, state_dtype)
    meta = prefix_bytes(config, args.dtype)
    params = param_bytes(config, args.dtype)
    table = Table(title=f"{args.preset or args.config}, texts of {args.context} tokens")
    for name in ("MB", "one text", f"{args.batch} texts"):
        table.add_column(name, justify="left" if name == "MB" else "right")
    kv = args.dtype
    for name, size in (
        (f"keys and values, global layers, {kv}", text.global_kv),
        (f"keys and values, window layers, {kv}", text.window_kv),
        (f"inputs of the convolutions, {kv}", text.conv_inputs),
        (f"SSM states, {state_dtype}", text.ssm_states),
        ("cache", text.total),
    ):
        table.add_row(name, _mb(size), _mb(size * args.batch), end_section=name == "cache")
    for name, size in (
        ("meta tokens, global layers, held once", meta.global_kv),
        ("meta tokens, all else, held once", meta.total - meta.global_kv),
        (f"parameters, {args.dtype}", params),
    ):
        table.add_row(name, _mb(size), _mb(size))
    fixed = params + meta.total
    table.add_section()
    table.add_row("in all", _mb(fixed + text.total), _mb(fixed + text.total * args.batch))
    Console().print(table)


def cache_bytes(config: HymbaConfig, context: int, dtype: DType, state_dtype: DType) -> CacheBytes:
    """What `empty_cache` allocates for one text."""
    cache = jax.eval_shape(lambda: empty_cache(config, 1, context, dtype, state_dtype))
    return _by_use(config, cache.layers)


def prefix_bytes(config: HymbaConfig, dtype: DType) -> CacheBytes:
    """What the meta tokens leave behind, held once for all texts."""
    return _by_use(config, jax.eval_shape(lambda: empty_prefix(config, dtype)))


def param_bytes(config: HymbaConfig, dtype: DType) -> int:
    """What the parameters take."""
    compute = ComputeConfig(dtype=dtype, param_dtype=dtype)
    return _bytes(nnx.state(nnx.eval_shape(lambda: Hymba(config, compute, nnx.Rngs(0)))))


def _by_use(config: HymbaConfig, layers: Any) -> CacheBytes:
    kv = {"global": 0, "window": 0}
    for spec, layer in zip(config.layer_specs, layers, strict=True):
        if spec.attention is not None:
            kv[spec.attention] += _bytes(layer.kv)
    return CacheBytes(
        global_kv=kv["global"],
        window_kv=kv["window"],
        conv_inputs=sum(_bytes(layer.ssm.conv_inputs) for layer in layers if layer.ssm),
        ssm_states=sum(_bytes(layer.ssm.ssm_state) for layer in layers if layer.ssm),
    )


def _bytes(tree: Any) -> int:
    return sum(leaf.size * jnp.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree))


def _mb(size: int) -> str:
    return f"{size / MB:,.2f}"


def _architecture(args: MemoryConfig) -> HymbaConfig:
    if bool(args.preset) == bool(args.config):
        raise HymbaError("name either a preset or a config")
    if args.config:
        return read_model(args.config)[0]
    if args.preset not in PRESETS:
        raise HymbaError(f"preset is {args.preset!r}, not one of {', '.join(PRESETS)}")
    return PRESETS[args.preset]
