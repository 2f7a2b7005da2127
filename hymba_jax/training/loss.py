"""Objectives: what training minimizes, and validation reports.

An objective maps a model and a batch to named averages; `loss` is minimized, the others are
metrics. Averages are pairs of sum and weight, so that micro-batches and batches combine exactly.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from flax import nnx

from hymba_jax.data import IGNORED_TARGET, Batch
from hymba_jax.model import Hymba
from hymba_jax.model.abstract import Params
from hymba_jax.model.lora import set_dropout
from hymba_jax.ops.cross_entropy import cross_entropy

type Scalar = Any
"""A number, or an array of one: of JAX in a step, of Python after it."""


class Average(NamedTuple):
    """A mean before the division.

    Attributes:
      total: the sum.
      weight: its divisor, such as the number of tokens.
    """

    total: Scalar
    weight: Scalar

    @property
    def mean(self) -> Scalar:
        return self.total / self.weight


type Averages = dict[str, Average]
"""By name; `loss` is among them."""

type Objective = Callable[..., Averages]
"""Of a model and a batch, and of a teacher's model if there is one; and of `z_loss`, by name, in
the steps of a run with training.z_loss.

Validation takes bits per byte from `cross_entropy`, in nats per token, or, where that is not among
the averages, from `loss`, which then has to be it.
"""

type LossFn = Callable[..., Averages]
"""Of parameters and a batch, and of a teacher's parameters if there is one."""


def next_token_loss(model: Hymba, batch: Batch, z_loss: float = 0.0) -> Averages:
    """The objective of pretraining: cross entropy, in nats per token.

    Over the positions whose target is not IGNORED_TARGET.

    Args:
      z_loss: weight of the z-loss, see `hymba_jax.ops.cross_entropy`. `loss` then includes it, and
        `cross_entropy` does not.
    """
    kernel, valid = model.output_projection, batch.targets != IGNORED_TARGET
    total = cross_entropy(
        model.last_hidden_state(batch.inputs, batch.segment_ids),
        kernel[...],
        batch.targets,
        valid,
        axes=kernel.get_metadata("axes"),
        z_loss=z_loss,
    )
    averages = {"loss": Average(total.loss, valid.sum())}
    if z_loss:
        averages["cross_entropy"] = Average(total.nats.sum(), valid.sum())
    return averages


def make_loss_fn(
    objective: Objective, graph: nnx.GraphDef[Hymba], teacher: nnx.GraphDef[Hymba] | None = None
) -> LossFn:
    """The objective as a function of the parameters of a model.

    Args:
      teacher: the model of a teacher, whose parameters the function takes behind the batch.
    """

    def loss_fn(params: Params, batch: Batch, *teacher_params: Params) -> Averages:
        model = nnx.merge(graph, params)
        if batch.dropout_seeds is not None:
            set_dropout(model, batch.dropout_seeds)
        if teacher is None:
            return objective(model, batch)
        return objective(model, batch, nnx.merge(teacher, *teacher_params))

    return loss_fn


def add_averages(several: Iterable[Averages]) -> Averages:
    """The sum of several batches' averages, in double precision."""
    sums: Averages = {}
    for averages in several:
        for name, (total, weight) in averages.items():
            before = sums.get(name, Average(0.0, 0.0))
            sums[name] = Average(before.total + float(total), before.weight + float(weight))
    return sums


def means(averages: Averages) -> dict[str, float]:
    """The means; averages with weight 0 are left out."""
    return {name: float(value.mean) for name, value in averages.items() if value.weight}
