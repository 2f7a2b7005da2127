"""Validation: the objective on held-out text, the same at every batch size and device count."""

from collections.abc import Callable

import jax
from jax.sharding import Mesh

from hymba_jax.data import Data, validation_batches
from hymba_jax.model.abstract import Params
from hymba_jax.parallel.mesh import global_batch, process_rows
from hymba_jax.training.loss import LossFn, add_averages, means

type Validate = Callable[[Params, bool], dict[str, float]]
"""The metrics of parameters by name, over all held-out text if `full`, else over a sample of it."""


def make_validate(
    loss_fn: LossFn, data: Data, mesh: Mesh, sequence_length: int, batch_size: int, limit: int
) -> Validate:
    """The function (params, full) -> metrics.

    Args:
      batch_size: sequences at once.
      limit: sequences that are used unless `full`.
    """
    eval_step = jax.jit(loss_fn)
    rows = process_rows(mesh, batch_size)

    def validate(params: Params, full: bool) -> dict[str, float]:
        batches = validation_batches(
            data.validation, sequence_length, batch_size, None if full else limit, rows
        )
        # Dispatched asynchronously: the first is waited for when all are under way.
        averages = [eval_step(params, global_batch(batch, mesh, batch_size)) for batch in batches]
        values = means(add_averages(averages))
        metrics = {f"validation_{name}": value for name, value in values.items()}
        return metrics | {"validation_bits_per_byte": data.bits_per_byte(values["loss"])}

    return validate
