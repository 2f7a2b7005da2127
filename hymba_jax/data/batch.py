"""A batch of training: what the data pipeline yields and a training step takes."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding

from hymba_jax.types import UInt

IGNORED_TARGET = -100
"""Target of positions that losses ignore."""

type Tokens = Any
"""int32, (batch, length): of NumPy in the pipeline, of JAX in a step, or abstract."""


class Batch(NamedTuple):
    """Rows of tokens as a pytree of arrays of one shape.

    Whatever stacks, shards or splits batches maps over the fields, so that a new one is declared
    here, filled in `make_row`, and read by the model or the loss that wants it.

    Attributes:
      inputs: tokens.
      targets: the token after each of them, or IGNORED_TARGET.
      segment_ids: the document of each position where rows have several, each computed as if it
        were alone: 1, 2, ... in a row, and 0 for padding behind them. None where a row is one
        sequence, whatever documents are in it.
      reference_log_probs: float32, of objectives with a reference model: at the first position of
        each document, what that model gives its targets, a sum over them; 0 elsewhere.
      dropout_seeds: uint32, (batch,), of the dropout in each row, filled by training steps; None
        where there is none.
    """

    inputs: Tokens
    targets: Tokens
    segment_ids: Tokens | None = None
    reference_log_probs: Any = None
    dropout_seeds: Any = None


def make_row(tokens: UInt[np.ndarray, " window"], length: int) -> Batch:
    """One row, (length,) each field, of inputs and next-token targets.

    Args:
      tokens: at most length + 1; the rest of the row is padding.
    """
    inputs, targets = np.zeros(length, np.int32), np.full(length, IGNORED_TARGET, np.int32)
    predicted = tokens[1:]
    inputs[: predicted.size] = tokens[:-1]
    targets[: predicted.size] = predicted
    return Batch(inputs, targets)


def stack_rows(rows: Sequence[Batch]) -> Batch:
    """One batch of several rows, which have the same fields."""
    batch: Batch = jax.tree.map(lambda *values: np.stack(values), *rows)
    return batch


def abstract_batch(
    batch_size: int,
    length: int,
    sharding: Sharding | None = None,
    *,
    segment_ids: bool = False,
    reference: bool = False,
) -> Batch:
    """Shape, dtype and sharding of every field of a batch, with those that are asked for."""
    field = jax.ShapeDtypeStruct((batch_size, length), jnp.int32, sharding=sharding)
    given = jax.ShapeDtypeStruct((batch_size, length), jnp.float32, sharding=sharding)
    return Batch(field, field, field if segment_ids else None, given if reference else None)
