"""The programs that are compiled ahead of time: those that the other commands run.

Prefill alone is not: it takes whole prompts at once, and engines take them in chunks.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from hymba_jax.aot.fit import Memory, inference_advice, training_advice
from hymba_jax.checkpoint.train_state import abstract_train_state
from hymba_jax.config import CacheFormat, ComputeConfig, DType, HymbaConfig, WeightFormat
from hymba_jax.config.run import RunConfig
from hymba_jax.convert.init_from import InitialModel
from hymba_jax.errors import HymbaError
from hymba_jax.inference.batch_state import PaddedChunk
from hymba_jax.inference.engine import Engine, bucket
from hymba_jax.model import Hymba
from hymba_jax.model.abstract import abstract_model
from hymba_jax.model.flops import forward_flops, training_flops
from hymba_jax.model.sharding import describe_sharding
from hymba_jax.model.trainable import trainable_of
from hymba_jax.parallel.mesh import (
    bytes_per_device,
    make_mesh,
)
from hymba_jax.training.distillation import read_teacher
from hymba_jax.training.loss import Objective
from hymba_jax.training.objectives import objective_of
from hymba_jax.training.optimizer import make_optimizer
from hymba_jax.training.step import check_batch, compile_train_step, run_step


class AotProgram(NamedTuple):
    """A program that has not been compiled yet.

    Attributes:
      step: what one run of it does, in words.
      arguments: bytes per chip.
      model_flops: FLOPs that the model needs for a step, on all chips together.
      advice: what to change, given its memory and what is available.
    """

    mesh: Mesh
    step: str
    sharding: str
    num_params: int
    arguments: int
    model_flops: float
    compile: Callable[[], Any]
    advice: Callable[[Memory, float], Iterator[str]]


def training_program(
    run: RunConfig,
    devices: Sequence[jax.Device],
    objective: Objective | None = None,
    teacher: InitialModel | None = None,
    table: str = "training",
) -> AotProgram:
    """The step that `hymba train` runs on these devices.

    Args:
      run: without stages, as a stage of a run is.
      objective: what the run minimizes, in place of the config's.
      teacher: in place of the model that the config names, if the objective has one.
      table: of the config, that sets gradient_accumulation_steps.

    Raises:
      HymbaError: the run cannot be sharded over them as configured.
    """
    training, length = run.training, run.data.sequence_length
    mesh = make_mesh(devices, run.parallel)
    check_batch(training, mesh)
    optimizer = make_optimizer(training)
    trainable = trainable_of(run)
    abstract = abstract_train_state(run.model, run.compute, optimizer, mesh, trainable)
    taught = read_teacher(run, mesh, teacher)
    given = (taught.abstract,) if taught else ()
    objective = objective or objective_of(run)
    teacher_graph = taught.graph if taught else None
    train_step, batch = run_step(run, objective, abstract.graph, optimizer, mesh, teacher_graph)
    flops = training_flops(run.model, length, trainable) * training.batch_size
    if taught:
        config = taught.source.config
        flops += forward_flops(config, length, predicted=length) * training.batch_size
    is_partial = abstract.num_trained < abstract.num_params
    return AotProgram(
        mesh,
        f"training{f' {abstract.num_trained:,} of them' if is_partial else ''}"
        f"{'' if training.objective == 'next_token' else f' by {training.objective}'}, "
        f"{training.batch_size} sequences of {length} tokens per step, "
        f"{training.micro_batch_size} at a time",
        describe_sharding(run.model, mesh, length),
        abstract.num_params,
        bytes_per_device((abstract.state, batch, given)),
        flops,
        partial(compile_train_step, train_step, abstract.state, batch, *given),
        partial(training_advice, run, mesh, table),
    )


def inference_program(
    run: RunConfig,
    name: str,
    devices: Sequence[jax.Device],
    batch: int,
    context: int,
    weights: WeightFormat = "float",
    kv_cache: CacheFormat = "float",
) -> AotProgram:
    """A program of the engine, on one of these devices as `hymba generate` uses one.

    Args:
      name: `prefill` of a batch of prompts of `context` tokens in one chunk, whatever the engine's
        longest; or `decode`, of which a step is a token of each sequence.
      batch: rounded up to a power of two, as the engine does.

    Raises:
      HymbaError: the model has no such context.
    """
    if batch < 1:
        raise HymbaError(f"batch is {batch}, not at least 1")
    batch = bucket(batch)
    mesh = Mesh(np.array(devices[:1]), ("chip",))
    programs = InferencePrograms(
        run.model, mesh, run.compute.dtype, "float32", context, weights, kv_cache
    )
    traced = (programs.prefill if name == "prefill" else programs.decode)(batch, context)
    _, params = abstract_model(run.model, run.compute, make_mesh(devices[:1]))
    flops = partial(forward_flops, run.model)
    if name == "prefill":
        step = f"prefill of {batch} prompts of {context} tokens"
        model = flops(context, predicted=0)
    else:
        step = f"decoding {batch} sequences of {context} tokens, one token each per step"
        before = flops(context - 1, predicted=0)
        model = flops(context, predicted=1) - before
    return AotProgram(
        mesh,
        step,
        f"one of {len(devices)} chips, as generating uses one",
        sum(leaf.size for leaf in jax.tree.leaves(params)),
        bytes_per_device(traced.arguments),
        model * batch,
        lambda: traced.program.lower().compile(),
        partial(inference_advice, batch, bytes_per_device(programs.params)),
    )


class TracedProgram(NamedTuple):
    """A program, and the arrays that it should read once and write once."""

    program: Any
    arguments: Any
    read: Any
    written: Any
    cache: Any


class InferencePrograms:
    """The engine's programs, traced for shapes on a chip.

    Raises:
      HymbaError: the model has no such context.
    """

    def __init__(
        self,
        config: HymbaConfig,
        mesh: Mesh,
        dtype: DType,
        state_dtype: DType,
        context: int | None = None,
        weights: WeightFormat = "float",
        kv_cache: CacheFormat = "float",
    ):
        self.mesh, self.vocab_size = mesh, config.num_embeddings
        compute = ComputeConfig(dtype=dtype, param_dtype=dtype, scan_layers=False)
        engines: list[Engine] = []

        def make_params() -> Any:
            model = Hymba(config, compute, nnx.Rngs(0))
            engine = Engine(
                model, state_dtype=state_dtype, weights=weights, kv_cache=kv_cache, context=context
            )
            engines.append(engine)
            return engines[0].params

        self.params = self._shapes(make_params)  # nothing is computed
        self._programs = engines[0].programs
        self._meta = self._shapes(self._programs.meta_state, self.params)

    def decode(self, batch: int, context: int) -> TracedProgram:
        """Decoding `batch` sequences, each with a cache of `context` tokens."""
        init_state = partial(self._programs.init_state, batch=batch, context=context)
        state = self._shapes(init_state, self.params, self._meta)
        steps = self._shapes(lambda: jnp.int32(0))
        allowed = self._shapes(lambda: jnp.ones(self.vocab_size, bool))
        arguments = (self.params, self._meta, allowed, state, steps)
        layers = state.cache.layers
        program = self._trace(self._programs.decode, *arguments)
        return TracedProgram(
            program,
            arguments,
            read=(self.params, self._meta, layers),
            written=[layer.ssm for layer in layers],
            cache=layers,
        )

    def prefill(self, batch: int, length: int) -> TracedProgram:
        """Prefilling `batch` prompts of `length` tokens."""
        init_prefill = partial(self._programs.init_prefill, batch=batch, context=length)
        state = self._shapes(init_prefill, self.params, self._meta)
        chunk = self._shapes(
            lambda: PaddedChunk(jnp.zeros((batch, length), jnp.int32), jnp.zeros(batch, jnp.int32))
        )
        arguments = (self.params, self._meta, state, chunk)
        layers = state.cache.layers
        program = self._trace(self._programs.prefill, *arguments, is_start=True)
        return TracedProgram(
            program, arguments, read=(self.params, self._meta), written=layers, cache=layers
        )

    def _trace(self, program: Any, *arguments: Any, **options: Any) -> Any:
        with jax.set_mesh(self.mesh):
            return program.trace(*arguments, **options)

    def _shapes(self, function: Callable[..., Any], *arguments: Any) -> Any:
        sharding = NamedSharding(self.mesh, PartitionSpec())
        return jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding),
            jax.eval_shape(function, *arguments),
        )
