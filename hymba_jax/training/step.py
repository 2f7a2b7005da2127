"""One update of the parameters, as a pure function of plain trees."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from hymba_jax.checkpoint.train_state import TrainState
from hymba_jax.config.run import RunConfig
from hymba_jax.config.training import TrainingConfig
from hymba_jax.data import Batch
from hymba_jax.data.batch import abstract_batch
from hymba_jax.errors import HymbaError
from hymba_jax.model import Hymba
from hymba_jax.model.abstract import Params
from hymba_jax.model.trainable import TRAIN_ALL, Trainable, join, trainable_of
from hymba_jax.parallel.mesh import AnyMesh, batch_sharding, batch_shards
from hymba_jax.training.fixed_order import in_fixed_order
from hymba_jax.training.loss import Average, Averages, LossFn, Objective, make_loss_fn
from hymba_jax.training.objectives import has_reference
from hymba_jax.training.optimizer import applied_learning_rate
from hymba_jax.types import Array, Float, UInt

SKIPPED, PADDING = "skipped", "padding"

type Metrics = dict[str, Average | Float[Array, ""]]
"""Metrics of an update, by name.

Those of the objective, `loss` among them; `grad_norm`, before clipping; `learning_rate`, if the
optimizer's state has it; PADDING, the share of positions that packed documents leave; and SKIPPED,
1 or 0, if updates may be skipped.
"""

type TrainStep = Callable[..., tuple[TrainState, Metrics]]
"""Of a state and a batch, and of a teacher's parameters if there is one."""


def make_train_step(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    *,
    micro_batch_size: int,
    reduction_shards: int = 0,
    skip_nonfinite: bool = False,
    trainable: Trainable = TRAIN_ALL,
    seed: int = 0,
) -> TrainStep:
    """The function (state, batch) -> (next state, metrics).

    With a teacher it takes the teacher's parameters, too, as `loss_fn` does.

    The batch is computed `micro_batch_size` rows at a time. Losses and gradients are sums until the
    last of them, so they are those of the batch as a whole, however its targets are spread. Sums
    of gradients are float32.

    Args:
      reduction_shards: of a batch, which are computed and summed one by one in place of
        micro-batches, see `in_fixed_order`; none if 0.
      skip_nonfinite: the state does not change if the loss or the gradient's norm is not finite.
      trainable: the parameters that are differentiated and updated.
      seed: of an adapter's dropout.
    """

    def summed_loss(
        trained: Params, frozen: Params, batch: Batch, *teacher: Params
    ) -> tuple[Float[Array, ""], Averages]:
        averages = loss_fn(join(trained, frozen), batch, *teacher)
        return averages["loss"].total, averages

    def gradients(params: Params, batch: Batch) -> Any:
        return jax.value_and_grad(summed_loss, has_aux=True)(
            params["trained"], params["frozen"], batch, *params["teacher"]
        )

    def addends(params: Params, batch: Batch) -> Any:
        # A sum in bfloat16 stops growing at 256 times its addends.
        result, grads = gradients(params, batch)
        return result, optax.tree.cast(grads, jnp.float32)

    def train_step(state: TrainState, batch: Batch, *teacher: Params) -> tuple[TrainState, Metrics]:
        trained, frozen = trainable.split(state.params)
        rows = batch.inputs.shape[0]
        if trainable.adapter.dropout:
            batch = batch._replace(dropout_seeds=_dropout_seeds(seed, state.optimizer, rows))
        compute: Callable[[Params, Batch], Any] = gradients
        if reduction_shards:
            compute = in_fixed_order(addends, reduction_shards)
        elif micro_batch_size < rows:
            compute = optax.microbatching.microbatch(
                addends, argnums=1, microbatch_size=micro_batch_size
            )
        (_, averages), grads = compute(
            {"trained": trained, "frozen": frozen, "teacher": teacher}, batch
        )
        weight = averages["loss"].weight.astype(jnp.float32)
        grads = jax.tree.map(lambda grad: grad / weight, grads)
        updates, moments = optimizer.update(grads, state.optimizer, trained)
        following = TrainState(join(optax.apply_updates(trained, updates), frozen), moments)
        grad_norm = optax.tree.norm(grads)
        metrics = averages | {"grad_norm": Average(grad_norm, 1)}
        if batch.segment_ids is not None:
            is_padding = batch.segment_ids == 0
            metrics[PADDING] = Average(is_padding.sum(), is_padding.size)
        if (rate := applied_learning_rate(moments)) is not None:
            metrics["learning_rate"] = rate
        if skip_nonfinite:
            is_finite = jnp.isfinite(averages["loss"].mean) & jnp.isfinite(grad_norm)
            following = jax.tree.map(partial(jnp.where, is_finite), following, state)
            metrics[SKIPPED] = 1.0 - is_finite
        return following, metrics

    return train_step


def _dropout_seeds(seed: int, state: optax.OptState, rows: int) -> UInt[Array, " rows"]:
    """Seeds for the rows of a batch, by the run's and the number of updates before it."""
    count = optax.tree.get_all_with_path(state, "count")[0][1]
    return jax.random.bits(jax.random.fold_in(jax.random.key(seed), count), (rows,), jnp.uint32)


def run_step(
    run: RunConfig,
    objective: Objective,
    graph: nnx.GraphDef[Hymba],
    optimizer: optax.GradientTransformation,
    mesh: AnyMesh,
    teacher: nnx.GraphDef[Hymba] | None = None,
) -> tuple[TrainStep, Batch]:
    """The training step of a run, and the abstract batch that it takes.

    Args:
      teacher: as of `make_loss_fn`.
    """
    training = run.training
    if training.z_loss:
        objective = partial(objective, z_loss=training.z_loss)
    train_step = make_train_step(
        make_loss_fn(objective, graph, teacher),
        optimizer,
        micro_batch_size=training.micro_batch_size,
        reduction_shards=training.reduction_shards,
        skip_nonfinite=training.on_nonfinite == "skip",
        trainable=trainable_of(run),
        seed=run.seed,
    )
    batch = abstract_batch(
        training.batch_size,
        run.data.sequence_length,
        batch_sharding(mesh),
        segment_ids=run.data.packing == "documents",
        reference=has_reference(run),
    )
    return train_step, batch


def compile_train_step(
    train_step: TrainStep, state: TrainState, batch: Batch, *teacher: Params
) -> jax.stages.Compiled:
    """The compiled training step; the state is donated.

    Args:
      state, batch, teacher: abstract, with their shardings; the next state has those of the state.
    """
    shardings = jax.tree.map(lambda array: array.sharding, state)
    jitted = jax.jit(train_step, donate_argnums=0, out_shardings=(shardings, None))
    return jitted.lower(state, batch, *teacher).compile()


def check_batch(training: TrainingConfig, mesh: AnyMesh) -> None:
    """Refuses batch sizes that a mesh does not divide.

    Raises:
      HymbaError: the devices cannot share a micro-batch, or the reduction shards, equally.
    """
    devices = f"data {mesh.shape['data']} x fsdp {mesh.shape['fsdp']} devices"
    if training.micro_batch_size % batch_shards(mesh):
        raise HymbaError(
            "training.batch_size / training.gradient_accumulation_steps is "
            f"{training.micro_batch_size} sequences, which {devices} cannot share equally"
        )
    if not training.reduction_shards:
        return
    if mesh.shape["data"] < mesh.size:
        raise HymbaError(
            "training.reduction_shards needs all devices along data, as sharded parameters are not "
            "computed with alike on every mesh: set parallel.data -1, the other axes 1"
        )
    if training.reduction_shards % mesh.size:
        raise HymbaError(
            f"training.reduction_shards is {training.reduction_shards}, which {mesh.size} devices "
            "cannot share equally"
        )
