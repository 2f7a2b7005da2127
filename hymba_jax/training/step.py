"""One update of the parameters, and one evaluation: pure functions of plain trees."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import NamedSharding

from hymba_jax.errors import HymbaError
from hymba_jax.model import Hymba
from hymba_jax.sharding import AnyMesh, batch_parts
from hymba_jax.training.config import TrainingConfig
from hymba_jax.training.loss import LossSum, next_token_loss
from hymba_jax.training.optimizer import applied_learning_rate
from hymba_jax.training.state import AbstractTrainState, Params, TrainState
from hymba_jax.types import Array, Float, Int

type Batch = dict[str, Int[Array, "batch length"]]
"""`inputs`, and `targets` one token ahead."""


class StepMetrics(NamedTuple):
    """Of the parameters before the update, and of the update.

    Attributes:
      loss: mean cross entropy of the batch, in nats a token.
      tokens: over which it is the mean.
      grad_norm: length of its gradient before clipping.
      learning_rate: that the optimizer applied, by its own state; None where that does not say.
    """

    loss: Float[Array, ""]
    tokens: Int[Array, ""]
    grad_norm: Float[Array, ""]
    learning_rate: Float[Array, ""] | None


def make_eval_step(graph: nnx.GraphDef[Hymba]) -> Callable[[Params, Batch], LossSum]:
    """The function (params, batch) -> summed loss."""

    def eval_step(params: Params, batch: Batch) -> LossSum:
        return next_token_loss(nnx.merge(graph, params)(batch["inputs"]), batch["targets"])

    return eval_step


def make_train_step(
    graph: nnx.GraphDef[Hymba], optimizer: optax.GradientTransformation, *, micro_batch_size: int
) -> Callable[[TrainState, Batch], tuple[TrainState, StepMetrics]]:
    """The function (state, batch) -> (next state, metrics).

    The batch is computed `micro_batch_size` rows at a time. Loss and gradient are sums until the
    last of them, so they are those of the batch as a whole, however its targets are spread.
    """
    eval_step = make_eval_step(graph)

    def summed_loss(params: Params, batch: Batch) -> tuple[Float[Array, ""], LossSum]:
        loss = eval_step(params, batch)
        return loss.nats, loss

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
        rows = batch["inputs"].shape[0]
        compute = optax.microbatching.microbatch(
            jax.value_and_grad(summed_loss, has_aux=True),
            argnums=1,
            microbatch_size=micro_batch_size if micro_batch_size < rows else None,
        )
        (_, loss), grads = compute(state.params, batch)
        grads = jax.tree.map(lambda grad: grad / loss.tokens.astype(grad.dtype), grads)
        updates, moments = optimizer.update(grads, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = StepMetrics(
            loss=loss.nats / loss.tokens,
            tokens=loss.tokens,
            grad_norm=optax.tree.norm(grads),
            learning_rate=applied_learning_rate(moments),
        )
        return TrainState(params, moments), metrics

    return train_step


def check_batch(config: TrainingConfig, mesh: AnyMesh) -> None:
    """Refuses batches that a mesh cannot split.

    Raises:
      HymbaError: their pieces have no equal parts for its devices.
    """
    if config.micro_batch_size % batch_parts(mesh):
        raise HymbaError(
            "training.batch_size / training.gradient_accumulation_steps is "
            f"{config.micro_batch_size} sequences, which data {mesh.shape['data']} x fsdp "
            f"{mesh.shape['fsdp']} devices cannot share equally"
        )


def compile_train_step(
    abstract: AbstractTrainState,
    optimizer: optax.GradientTransformation,
    config: TrainingConfig,
    sequence_length: int,
    batch_sharding: NamedSharding,
) -> jax.stages.Compiled:
    """The training step, compiled now; it reuses the memory of the state it is given."""
    step = make_train_step(abstract.graph, optimizer, micro_batch_size=config.micro_batch_size)
    rows = jax.ShapeDtypeStruct(
        (config.batch_size, sequence_length), jnp.int32, sharding=batch_sharding
    )
    jitted = jax.jit(step, donate_argnums=0, out_shardings=(abstract.shardings, None))
    return jitted.lower(abstract.state, {"inputs": rows, "targets": rows}).compile()
