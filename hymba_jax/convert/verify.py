"""Whether a model computes what it should: its logits beside others', from a file."""

from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx

from hymba_jax.config import HymbaConfig
from hymba_jax.errors import HymbaError
from hymba_jax.model import Hymba
from hymba_jax.types import Float, Int


class Expected(NamedTuple):
    """Token ids and the logits after each of them."""

    input_ids: Int[np.ndarray, "batch length"]
    logits: Float[np.ndarray, "batch length vocab"]


class Agreement(NamedTuple):
    """How close logits are to the expected ones.

    Attributes:
      max_difference: the largest, of all logits.
      kl_divergence: of the distributions, from the expected one to ours, in nats, mean over tokens.
      top_1: part of the tokens after which the likeliest token is the same.
    """

    max_difference: float
    kl_divergence: float
    top_1: float


def read_expected(path: Path, config: HymbaConfig) -> Expected:
    """The arrays `input_ids` and `logits` of a .npz file.

    Raises:
      HymbaError: the file has no such arrays, or they do not fit the model.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            expected = Expected(arrays["input_ids"], arrays["logits"])
    except KeyError as error:
        raise HymbaError(f"{path}: needs arrays input_ids and logits ({error.args[0]})") from error
    except (ValueError, EOFError) as error:
        raise HymbaError(f"{path}: not a .npz file ({error})") from error
    ids, logits = expected
    if ids.ndim != 2 or not np.issubdtype(ids.dtype, np.integer) or ids.size == 0:
        raise HymbaError(f"{path}: input_ids are not whole numbers of shape (batch, length)")
    if logits.shape != (*ids.shape, config.num_embeddings):
        raise HymbaError(
            f"{path}: logits have shape {logits.shape}, not {(*ids.shape, config.num_embeddings)}"
        )
    if ids.min() < 0 or ids.max() >= config.num_embeddings:
        raise HymbaError(f"{path}: input_ids are outside the vocabulary of {config.num_embeddings}")
    return expected


def compare(model: Hymba, expected: Expected) -> Agreement:
    """Runs the model on the token ids; NaN anywhere makes every difference NaN."""
    graph, params = nnx.split(model)
    with jax.default_matmul_precision("highest"):
        run = jax.jit(lambda params, ids: nnx.merge(graph, params)(ids))
        ours = np.asarray(run(params, expected.input_ids.astype(np.int32)), np.float64)
    theirs = expected.logits.astype(np.float64)
    log_p, log_q = _log_softmax(theirs), _log_softmax(ours)
    return Agreement(
        max_difference=float(np.abs(ours - theirs).max()),
        kl_divergence=float((np.exp(log_p) * (log_p - log_q)).sum(-1).mean()),
        top_1=float((ours.argmax(-1) == theirs.argmax(-1)).mean()),
    )


def _log_softmax(
    logits: Float[np.ndarray, "batch length vocab"],
) -> Float[np.ndarray, "batch length vocab"]:
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
