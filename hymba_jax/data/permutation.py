"""The order of a source's rows: a permutation for each epoch, computed index by index.

A Feistel network with keyed rounds permutes pairs (left, right), as many as there are indices or
hardly more; an index that it takes beyond them is permuted again until it is one. Neither memory
nor start-up time depends on the number of rows, and the order does not depend on the version of
any library.
"""

import hashlib
import json
import math

import numpy as np

from hymba_jax.types import Int, UInt

_ROUNDS = 8

# Constants of splitmix64, whose last step mixes 64 bits so that each depends on all.
_GAMMA, _FIRST, _SECOND = (
    np.uint64(constant) for constant in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)


class Permutation:
    """A pseudorandom permutation of the numbers below `size`.

    Args:
      size: from 1 to 2**62.
      key: what the permutation depends on, such as a seed, a name and an epoch.
    """

    def __init__(self, size: int, *key: int | str) -> None:
        self.size = size
        self._left = np.uint64(math.isqrt(size - 1) + 1)
        self._right = np.uint64(-(-size // int(self._left)))
        digest = hashlib.blake2b(json.dumps(key).encode(), digest_size=8 * _ROUNDS)
        self._keys = np.frombuffer(digest.digest(), "<u8")

    def __call__(self, indices: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
        """Where each index goes, int64."""
        values = self._permuted_pairs(indices.astype(np.uint64))
        while (beyond := values >= self.size).any():
            values[beyond] = self._permuted_pairs(values[beyond])
        return values.astype(np.int64)

    def _permuted_pairs(self, values: UInt[np.ndarray, " n"]) -> UInt[np.ndarray, " n"]:
        left, right = np.divmod(values, self._right)
        for round_number, key in enumerate(self._keys):
            if round_number % 2:
                right = (right + _mixed(left, key)) % self._right
            else:
                left = (left + _mixed(right, key)) % self._left
        return left * self._right + right


def shuffled_row(position: int, num_rows: int, seed: int, source: str) -> tuple[int, int]:
    """The epoch that a position in a source's endless order is in, and the row that it is.

    Every row comes once an epoch; each epoch and each source has an order of its own.
    """
    epoch, index = divmod(position, num_rows)
    permutation = Permutation(num_rows, seed, source, epoch)
    return epoch, int(permutation(np.array([index]))[0])


def _mixed(values: UInt[np.ndarray, " n"], key: np.uint64) -> UInt[np.ndarray, " n"]:
    """Pseudorandom numbers below 2**63, so that adding to them does not overflow."""
    mixed = (values ^ key) + _GAMMA
    mixed = (mixed ^ (mixed >> np.uint64(30))) * _FIRST
    mixed = (mixed ^ (mixed >> np.uint64(27))) * _SECOND
    return (mixed ^ (mixed >> np.uint64(31))) >> np.uint64(1)
