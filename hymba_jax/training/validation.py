"""Validation: the objective on held-out text, the same at every batch size and device count."""

import math
from collections.abc import Callable, Mapping

import jax
from jax.sharding import Mesh

from hymba_jax.data import Batch, ValidationSet, validation_batches
from hymba_jax.model.abstract import Params
from hymba_jax.parallel.mesh import global_batch, process_rows
from hymba_jax.training.loss import Averages, LossFn, add_averages, means

type Validate = Callable[[Params, bool], dict[str, float] | None]
"""The metrics of parameters by name, over all held-out text if `full`, else over a sample of it.

None if the run was asked to stop meanwhile.
"""

_SAMPLE_LOSS = "validation_sample_loss"


def compile_eval_step(loss_fn: LossFn, params: Params, batch: Batch, *teacher: Params) -> LossFn:
    """The compiled loss.

    Args:
      params, batch, teacher: abstract, with their shardings.
    """
    return jax.jit(loss_fn).lower(params, batch, *teacher).compile()


def make_validate(
    eval_step: LossFn,
    sets: Mapping[str, ValidationSet],
    mesh: Mesh,
    batch_size: int,
    limit: int,
    stops: Callable[[], bool],
) -> Validate:
    """The function (params, full) -> metrics.

    The metrics of one set are `validation_loss` and so on. Of several, these are the means over all
    their targets and all their text, and `validation_loss/NAME` is that of each. If all text is
    used, `validation_sample_loss` is what it would be otherwise, to compare with the others.

    Args:
      batch_size: sequences at once.
      limit: sequences of each set that are used unless `full`.
      stops: whether to stop, asked before every batch.
    """
    rows = process_rows(mesh, batch_size)

    def evaluate(
        params: Params, validation_set: ValidationSet, limit: int | None
    ) -> dict[str, float] | None:
        batches = validation_batches(validation_set.rows, batch_size, limit, rows)
        sums: Averages = {}
        computing: Averages = {}  # of the batch under way
        for batch in batches:
            if stops():
                return None
            following = eval_step(params, global_batch(batch, mesh, batch_size))
            # Waits for the batch before, so that no more than two are left to do at a stop.
            sums, computing = add_averages([sums, computing]), following
        values = means(add_averages([sums, computing]))
        bits = validation_set.bits_per_byte(values.get("cross_entropy", values["loss"]))
        return values if bits is None else values | {"bits_per_byte": bits}

    def evaluate_all(params: Params, limit: int | None) -> dict[str, float] | None:
        by_set = {}
        for name, validation_set in sets.items():
            values = evaluate(params, validation_set, limit)
            if values is None:
                return None
            by_set[name] = values
        metrics = {f"validation_{name}": value for name, value in _overall(by_set, sets).items()}
        if len(sets) > 1:
            for name, values in by_set.items():
                metrics |= {f"validation_{key}/{name}": value for key, value in values.items()}
        return metrics

    def validate(params: Params, full: bool) -> dict[str, float] | None:
        sample = evaluate_all(params, limit)
        if not full or sample is None:
            return sample
        metrics = evaluate_all(params, None)
        return metrics and metrics | {_SAMPLE_LOSS: sample["validation_loss"]}

    return validate


def comparable_loss(metrics: Mapping[str, int | float]) -> float:
    """The validation loss that compares with those of other steps, which are of the same text.

    It is infinite without a validation.
    """
    return metrics.get(_SAMPLE_LOSS, metrics.get("validation_loss", math.inf))


def _overall(
    by_set: Mapping[str, Mapping[str, float]], sets: Mapping[str, ValidationSet]
) -> dict[str, float]:
    """The means over several sets: of bits per byte by their bytes, of others by `loss_weight`.

    Sets of conversations have no bits per byte.
    """
    overall = {}
    for name in dict.fromkeys(name for values in by_set.values() for name in values):
        weights = {
            key: (each.text_bytes or 0) if name == "bits_per_byte" else each.loss_weight
            for key, each in sets.items()
        }
        total = sum(weight * by_set[key].get(name, 0.0) for key, weight in weights.items())
        overall[name] = total / sum(weights.values())
    return overall
