"""Compares a model's logits with expected ones from a file."""

import math
import zipfile
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx

from hymba_jax.config import HymbaConfig
from hymba_jax.display import format_bytes
from hymba_jax.errors import HymbaError
from hymba_jax.files import open_regular
from hymba_jax.model import Hymba
from hymba_jax.types import Float, Int

_MAX_BYTES = 8 * 10**9  # of an array; comparing logits takes several times as much memory
_HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


class Expected(NamedTuple):
    """Token ids and the logits after each of them."""

    input_ids: Int[np.ndarray, "batch length"]
    logits: Float[np.ndarray, "batch length vocab"]


class Agreement(NamedTuple):
    """How close logits are to the expected ones.

    Attributes:
      max_difference: the largest, of all logits.
      kl_divergence: KL(expected || model) in nats, mean over tokens.
      top_1: fraction of positions at which the likeliest token is the same.
    """

    max_difference: float
    kl_divergence: float
    top_1: float


def read_expected(path: Path, config: HymbaConfig) -> Expected:
    """The arrays `input_ids` and `logits` of a .npz file.

    Raises:
      HymbaError: the file has no such arrays, or they do not fit the model.
    """
    with open_regular(path) as file:
        try:
            with zipfile.ZipFile(file) as archive:
                expected = Expected(_read(archive, "input_ids"), _read(archive, "logits"))
        except HymbaError as error:
            raise HymbaError(f"{path}: {error}") from error
        except Exception as error:  # zipfile, its decompressors and NumPy have many types
            raise HymbaError(f"{path}: not a .npz file that can be read ({error})") from error
    ids, logits = expected
    if ids.ndim != 2 or not np.issubdtype(ids.dtype, np.integer) or ids.size == 0:
        raise HymbaError(f"{path}: input_ids are not integers of shape (batch, length)")
    if not np.issubdtype(logits.dtype, np.floating):
        raise HymbaError(f"{path}: logits are {logits.dtype}, not floating-point numbers")
    if logits.shape != (*ids.shape, config.num_embeddings):
        raise HymbaError(
            f"{path}: logits have shape {logits.shape}, not {(*ids.shape, config.num_embeddings)}"
        )
    if ids.min() < 0 or ids.max() >= config.num_embeddings:
        raise HymbaError(f"{path}: input_ids are outside the vocabulary of {config.num_embeddings}")
    if ids.shape[1] > config.max_positions:
        raise HymbaError(
            f"{path}: input_ids are {ids.shape[1]} tokens long, the model has "
            f"{config.max_positions} positions"
        )
    return expected


def _read(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    """An array of a .npz file, which is read only once its size is known to be reasonable.

    Raises:
      HymbaError: there is no such array, it is too large, or it is of Python objects.
      Exception: it cannot be read.
    """
    member = f"{name}.npy"
    if member not in archive.namelist():
        raise HymbaError(f"needs arrays input_ids and logits ({name} is missing)")
    with archive.open(member) as file:
        version = np.lib.format.read_magic(file)
        if version not in _HEADERS:
            raise HymbaError(f"{name} is in version {version} of the .npy format")
        shape, _, dtype = _HEADERS[version](file)
    if dtype.hasobject:
        raise HymbaError(f"{name} is of Python objects, which are not read")
    size = math.prod(shape) * dtype.itemsize
    if size > _MAX_BYTES:
        raise HymbaError(
            f"{name} has shape {shape}, {format_bytes(size)}: give fewer tokens, "
            f"{format_bytes(_MAX_BYTES)} is the limit"
        )
    with archive.open(member) as file:
        return np.lib.format.read_array(file, allow_pickle=False)


def compare(model: Hymba, expected: Expected) -> Agreement:
    """Runs the model on the token ids; NaN anywhere makes every difference NaN."""
    graph, params = nnx.split(model)
    ids = expected.input_ids.astype(np.int32)
    with jax.default_matmul_precision("highest"):
        logits = np.asarray(_logits(graph, params, ids), np.float64)
    expected_logits = expected.logits.astype(np.float64)
    log_p, log_q = _log_softmax(expected_logits), _log_softmax(logits)
    return Agreement(
        max_difference=float(np.abs(logits - expected_logits).max()),
        kl_divergence=float((np.exp(log_p) * (log_p - log_q)).sum(-1).mean()),
        top_1=float((logits.argmax(-1) == expected_logits.argmax(-1)).mean()),
    )


@partial(jax.jit, static_argnums=0)
def _logits(
    graph: nnx.GraphDef[Hymba], params: nnx.State, ids: Int[jax.Array, "batch length"]
) -> Float[jax.Array, "batch length vocab"]:
    return nnx.merge(graph, params)(ids)


def _log_softmax(
    logits: Float[np.ndarray, "batch length vocab"],
) -> Float[np.ndarray, "batch length vocab"]:
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
