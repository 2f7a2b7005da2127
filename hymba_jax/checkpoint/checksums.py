"""Checksums of arrays by value, independent of mesh and processes.

An array's checksum is the sum, modulo 2**32, of a hash of each element's bits and its index in C
order. A sum has no order, so shards and chunks can be summed apart. At a given index different bits
have different hashes: damage to one element is always found, to several all but once in 2**32.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from hymba_jax.errors import HymbaError
from hymba_jax.files import Location
from hymba_jax.types import Array

type Checksums = dict[str, int]
"""By the dotted path of each array of a tree."""

_CHUNKS = (1 << 23, 1 << 20, 1 << 17, 1 << 14)  # elements
_ROWS = 256  # that a chunk is added up in
_INDEX_STEP = 0x9E3779B1  # odd, so that no two indices below 2**32 share a multiple
_KEY = "checksums"
_LISTED = 3  # damaged arrays that a message names


def tree_checksums(tree: Any) -> Checksums:
    """The checksum of every array; all processes that hold a part of the arrays must call it."""
    sums = {dotted(path): _checksum(leaf) for path, leaf in jax.tree.leaves_with_path(tree)}
    return {name: int(value) for name, value in jax.device_get(sums).items()}


def digest(checksums: Checksums) -> str:
    """All of them in one: short, to compare."""
    content = json.dumps(checksums, sort_keys=True).encode()
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def checksums_metadata(checksums: Checksums) -> dict[str, Any]:
    """The custom metadata of a tree that Orbax stores in its file `_METADATA`."""
    return {_KEY: checksums}


def check_tree(path: Location, tree: Any, metadata: Mapping[str, Any] | None) -> None:
    """Compares arrays with the checksums that were stored with them.

    Args:
      path: where the arrays were read, for the message.
      tree: of the arrays, or of some of them.
      metadata: Orbax's custom metadata of the stored tree.

    Raises:
      HymbaError: there are no checksums, or they do not match.
    """
    expected = (metadata or {}).get(_KEY)
    if not isinstance(expected, dict):
        raise HymbaError(f"{path}: has no checksums: it is damaged, or another program wrote it")
    found = tree_checksums(tree)
    damaged = [name for name, value in found.items() if expected.get(name) != value]
    if damaged:
        more = f" and {len(damaged) - _LISTED} more" if len(damaged) > _LISTED else ""
        raise HymbaError(
            f"{path}: damaged, checksums do not match "
            f"({', '.join(damaged[:_LISTED])}{more}): use another copy"
        )


def dotted(path: Any) -> str:
    """The path of an array in a tree of them, such as `groups.0.mixer.out_proj.kernel`."""
    return jax.tree_util.keystr(path, simple=True, separator=".")


def _checksum(array: Array | np.ndarray) -> jax.Array | np.uint32:
    if isinstance(array, jax.Array):
        devices = array.devices()
        if len(devices) > 1 or next(iter(devices)).platform != "cpu":
            return _of_sharded(array)
    return _of_host(np.asarray(array))


@jax.jit
def _of_sharded(array: Array) -> jax.Array:
    """One reduction, which XLA shards as the array is."""
    index, stride = jnp.zeros(array.shape, jnp.uint32), 1
    for axis in reversed(range(array.ndim)):
        position = lax.broadcasted_iota(jnp.uint32, array.shape, axis)
        index += position * jnp.uint32(stride % 2**32)
        stride *= array.shape[axis]
    bits = lax.bitcast_convert_type(array, jnp.dtype(f"uint{8 * array.dtype.itemsize}"))
    return jnp.sum(_hash(bits, index), dtype=jnp.uint32)


def _of_host(array: np.ndarray) -> np.uint32:
    """The same of the host's memory, in chunks of few sizes: few compilations for all shapes."""
    bits = np.ascontiguousarray(array).reshape(-1).view(f"u{min(array.itemsize, 4)}")
    total = start = 0
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        while start < bits.size:
            left = bits.size - start
            size = next((size for size in _CHUNKS if size <= left), _CHUNKS[-1])
            chunk = bits[start : start + size]
            count = np.uint32(chunk.size)
            if count < size:
                chunk = np.pad(chunk, (0, size - chunk.size))
            total += int(_of_chunk(chunk, np.uint32(start % 2**32), count))
            start += size
    return np.uint32(total % 2**32)


@jax.jit
def _of_chunk(bits: Array, start: Array, count: Array) -> jax.Array:
    """The sum over the first `count` elements, of which the first has the index `start`."""
    # XLA's loops on CPUs use vectors where arrays are added up, not where an array is reduced, and
    # the sums of short rows stay in a core's own cache.
    rows = bits.reshape(_ROWS, -1)
    width = rows.shape[1]

    def add_row(i: Array, sums: Array) -> Array:
        position = lax.iota(jnp.uint32, width) + i * jnp.uint32(width)
        hashes = _hash(rows[i], start + position)
        return sums + jnp.where(position < count, hashes, jnp.uint32(0))

    sums = lax.fori_loop(jnp.uint32(0), jnp.uint32(_ROWS), add_row, jnp.zeros(width, jnp.uint32))
    return jnp.sum(sums, dtype=jnp.uint32)


def _hash(bits: Array, index: Array) -> Array:
    """32 bits of hash; a permutation of the bits at any index (lowbias32 by C. Wellons)."""
    word = bits.astype(jnp.uint32) ^ (index * jnp.uint32(_INDEX_STEP))
    word = (word ^ (word >> 16)) * jnp.uint32(0x7FEB352D)
    word = (word ^ (word >> 15)) * jnp.uint32(0x846CA68B)
    return word ^ (word >> 16)
