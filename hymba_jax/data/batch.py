"""A batch of training: what the data pipeline yields and a training step takes."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding

from hymba_jax.types import UInt

IGNORED_TARGET = -100
"""Target of a position that no loss counts."""

type Tokens = Any
"""int32, (batch, length): of NumPy in the pipeline, of JAX in a step, or abstract."""


class Batch(NamedTuple):
    """Rows of tokens as a pytree of arrays of one shape.

    Whatever stacks, shards or splits batches maps over the fields, so that a new one is declared
    here, filled in `make_row`, and read by the model or the loss that wants it.

    Attributes:
      inputs: tokens.
      targets: the token after each of them, or IGNORED_TARGET.
    """

    inputs: Tokens
    targets: Tokens


def make_row(tokens: UInt[np.ndarray, " window"], length: int) -> Batch:
    """One row, (length,) each field, that predicts every token but the first from those before.

    Args:
      tokens: at most length + 1; the positions that they do not reach are padding.
    """
    inputs, targets = np.zeros(length, np.int32), np.full(length, IGNORED_TARGET, np.int32)
    predicted = tokens[1:]
    inputs[: predicted.size] = tokens[:-1]
    targets[: predicted.size] = predicted
    return Batch(inputs, targets)


def stack_rows(rows: Sequence[Batch]) -> Batch:
    """One batch of several rows."""
    return Batch(*(np.stack(values) for values in zip(*rows, strict=True)))


def abstract_batch(batch_size: int, length: int, sharding: Sharding | None = None) -> Batch:
    """Shape, dtype and sharding of every field of a batch."""
    field = jax.ShapeDtypeStruct((batch_size, length), jnp.int32, sharding=sharding)
    return Batch(*[field] * len(Batch._fields))
