"""`hymba memory`: the memory footprint of a model in inference and in training.

Sizes come from the code that allocates, which is only traced.
"""

import dataclasses
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import optax
from rich.console import Console
from rich.table import Table

from hymba_jax.checkpoint.model_file import read_model, read_trainable
from hymba_jax.config import PRESETS, CacheFormat, ComputeConfig, DType, HymbaConfig
from hymba_jax.config.adapter import NO_ADAPTER, AdapterConfig
from hymba_jax.config.model import find_preset
from hymba_jax.config.run import RunConfig, read_table
from hymba_jax.config.sampling import INT32_MAX
from hymba_jax.config.toml import override_from
from hymba_jax.config.training import TrainingConfig
from hymba_jax.errors import HymbaError
from hymba_jax.inference.memory import cache_bytes, meta_state_bytes
from hymba_jax.model.abstract import Params, abstract_model
from hymba_jax.model.trainable import TRAIN_ALL, Trainable
from hymba_jax.parallel.memory import tree_bytes
from hymba_jax.parallel.mesh import make_mesh
from hymba_jax.training.optimizer import make_optimizer


@dataclass(frozen=True)
class MemoryConfig:
    """Prints the memory that a model needs to generate and to be trained. Nothing is allocated.

    Attributes:
      preset: hymba-125m, hymba-350m or hymba-1.5b, trained by AdamW.
      config: TOML file of a run or a model, in place of a preset.
      context: maximum tokens per sequence; that of the model if absent.
      batch: sequences at a time.
      dtype: of parameters, keys, values and states in inference.
      state_dtype: of SSM states; dtype if absent. Generation uses float32 by default.
      kv_cache: format of keys and values in inference, "float" in `dtype` or "int8".
      param_dtype: of parameters and gradients in training; that of the config, or of a preset
        float32, if absent. Gradients of several micro-batches or reduction shards are added up in
        float32 whatever it is.
    """

    preset: str = ""
    config: str = ""
    context: int | None = None
    batch: int = 1
    dtype: DType = "bfloat16"
    state_dtype: DType | None = None
    kv_cache: CacheFormat = "float"
    param_dtype: DType | None = None


@dataclass(frozen=True)
class TrainingBytes:
    """Bytes of a training state, by purpose; activations are not counted.

    Attributes:
      params: trained and frozen.
      gradients: of the batch; not those of a micro-batch, which are added to them.
    """

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
    context = config.max_positions if args.context is None else args.context
    for name, size in (("context", context), ("batch", args.batch)):
        if not 1 <= size <= INT32_MAX:
            raise HymbaError(f"{name} is {size}, not between 1 and {INT32_MAX}, a 32-bit number")
    state_dtype = args.state_dtype or args.dtype
    param_dtype = args.param_dtype or compute.param_dtype
    cache = cache_bytes(config, context, args.dtype, state_dtype, args.kv_cache)
    sequence = sum(cache.values())
    meta = sum(meta_state_bytes(config, args.dtype).values())
    params = param_bytes(config, args.dtype)
    trainable = read_trainable(args.config) if args.config else TRAIN_ALL
    updates = read_training(args.config) if args.config else TrainingConfig()
    are_added = bool(args.config) and _adds_gradients(args.config, updates)
    training = training_bytes(config, param_dtype, trainable, updates, are_added=are_added)
    table = Table(
        title=f"{args.preset or args.config}, sequences of {context} tokens",
        caption="training: without activations, which depend on batch, length and remat",
    )
    table.add_column("GB")
    for name in ("one sequence", f"{args.batch} sequences", "training"):
        table.add_column(name, justify="right")
    for name, size in {**cache, "cache": sequence}.items():
        table.add_row(name, gb(size), gb(size * args.batch), "", end_section=name == "cache")
    for name, size in (("meta tokens", meta), (f"parameters, {args.dtype}", params)):
        table.add_row(name, gb(size), gb(size), "")
    table.add_section()
    copies = "" if param_dtype == "float32" or trainable.adapter else ", float32 parameters"
    average = ", EMA" if updates.ema_decay else ""
    trained = "trained" if trainable == TRAIN_ALL else "trained and frozen"
    grad_dtype = "float32" if trainable.adapter or are_added else param_dtype
    for name, size in (
        (f"{trained} parameters, {param_dtype}", training.params),
        (f"gradients, {grad_dtype}", training.gradients),
        (f"optimizer state, {updates.optimizer}{copies}{average}", training.optimizer),
    ):
        table.add_row(name, "", "", gb(size))
    fixed = params + meta
    table.add_section()
    table.add_row(
        "in all", *map(gb, (fixed + sequence, fixed + sequence * args.batch, training.total))
    )
    Console().print(table)


def param_bytes(config: HymbaConfig, dtype: DType) -> int:
    """The parameters."""
    return tree_bytes(_params(config, dtype))


def training_bytes(
    config: HymbaConfig,
    param_dtype: DType,
    trainable: Trainable = TRAIN_ALL,
    training: TrainingConfig = TrainingConfig(),  # noqa: B008, it is frozen
    *,
    are_added: bool = False,
) -> TrainingBytes:
    """What a training state allocates, and its gradients.

    Args:
      are_added: whether these are sums over several micro-batches or reduction shards.
    """
    params = _params(config, param_dtype, trainable.adapter)
    trained, _ = trainable.split(params)
    moments = jax.eval_shape(make_optimizer(training).init, trained)
    in_float32 = partial(optax.tree.cast, dtype=jnp.float32)
    gradients = jax.eval_shape(in_float32, trained) if are_added else trained
    return TrainingBytes(*map(tree_bytes, (params, gradients, moments)))


def _params(config: HymbaConfig, dtype: DType, adapter: AdapterConfig = NO_ADAPTER) -> Params:
    """The parameters without their values."""
    compute = ComputeConfig(dtype=dtype, param_dtype=dtype)
    return abstract_model(config, compute, make_mesh(jax.devices()[:1]), adapter)[1]


def _architecture(args: MemoryConfig) -> tuple[HymbaConfig, ComputeConfig]:
    if bool(args.preset) == bool(args.config):
        raise HymbaError(f"name either a preset or a config; presets are {', '.join(PRESETS)}")
    if args.config:
        _, table = read_table(args.config, RunConfig())
        if "model" not in table:
            raise HymbaError(
                f"{args.config}: has no [model], its run starts from a model: name the config.toml "
                "of that model, or of the run, or a preset"
            )
        return read_model(args.config)
    return find_preset(args.preset), ComputeConfig()


def read_training(file: str) -> TrainingConfig:
    """How the model of a config file is trained; the defaults of a standalone model's."""
    base, table = read_table(file, RunConfig())
    return override_from(file, base.training, table.get("training", {}))


def _adds_gradients(file: str, training: TrainingConfig) -> bool:
    """Whether a batch of a config file is computed in parts, in any stage."""
    _, table = read_table(file, RunConfig())
    name = "gradient_accumulation_steps"
    of_stages = [stage.get(name, 1) for stage in table.get("stages", {}).values()]
    return max(training.reduction_shards, training.gradient_accumulation_steps, *of_stages) > 1


def gb(size: int) -> str:
    """Bytes as GB (10**9), with three significant digits."""
    decimals = max(0, 12 - len(str(size))) if size else 0
    return f"{size / 1e9:,.{decimals}f}"
