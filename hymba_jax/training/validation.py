"""Validation: the objective on held-out text, the same at every batch size and device count."""

from collections.abc import Callable

import jax
from jax.sharding import Mesh

from hymba_jax.data import Batch, Data, validation_batches
from hymba_jax.model.abstract import Params
from hymba_jax.parallel.mesh import global_batch, process_rows
from hymba_jax.training.loss import Averages, LossFn, add_averages, means

type Validate = Callable[[Params, bool], dict[str, float] | None]
"""The metrics of parameters by name, over all held-out text if `full`, else over a sample of it.

None if the run was asked to stop meanwhile.
"""


def compile_eval_step(loss_fn: LossFn, params: Params, batch: Batch) -> LossFn:
    """The compiled loss.

    Args:
      params, batch: abstract, with their shardings.
    """
    return jax.jit(loss_fn).lower(params, batch).compile()


def make_validate(
    eval_step: LossFn,
    data: Data,
    mesh: Mesh,
    sequence_length: int,
    batch_size: int,
    limit: int,
    stops: Callable[[], bool],
) -> Validate:
    """The function (params, full) -> metrics.

    Args:
      batch_size: sequences at once.
      limit: sequences that are used unless `full`.
      stops: whether to stop, asked before every batch.
    """
    rows = process_rows(mesh, batch_size)

    def validate(params: Params, full: bool) -> dict[str, float] | None:
        batches = validation_batches(
            data.validation, sequence_length, batch_size, None if full else limit, rows
        )
        sums: Averages = {}
        computing: Averages = {}  # of the batch under way
        for batch in batches:
            if stops():
                return None
            following = eval_step(params, global_batch(batch, mesh, batch_size))
            # Waits for the batch before, so that no more than two are left to do at a stop.
            sums, computing = add_averages([sums, computing]), following
        values = means(add_averages([sums, computing]))
        metrics = {f"validation_{name}": value for name, value in values.items()}
        return metrics | {"validation_bits_per_byte": data.bits_per_byte(values["loss"])}

    return validate
