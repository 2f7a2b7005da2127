"""The order of a source's rows: a permutation for each epoch, computed index by index.

A Feistel network with keyed rounds permutes pairs (left, right), as many as there are indices or
hardly more; an index that it takes beyond them is permuted again until it is one. Neither memory
nor start-up time depends on the number of rows, and the order does not depend on the version of
any library.
"""

import hashlib
import json
import math
import struct

_ROUNDS = 8
_MASK = 2**64 - 1


class Permutation:
    """A pseudorandom permutation of the numbers below `size`.

    Args:
      key: what the permutation depends on, such as a seed, a name and an epoch.
    """

    def __init__(self, size: int, *key: int | str) -> None:
        self._size = size
        self._left = math.isqrt(size - 1) + 1
        self._right = -(-size // self._left)
        digest = hashlib.blake2b(json.dumps(key).encode(), digest_size=8 * _ROUNDS)
        self._keys = struct.unpack(f"<{_ROUNDS}Q", digest.digest())

    def __call__(self, index: int) -> int:
        """Where an index goes."""
        index = self._permuted_pair(index)
        while index >= self._size:
            index = self._permuted_pair(index)
        return index

    def _permuted_pair(self, index: int) -> int:
        left, right = divmod(index, self._right)
        for forth, back in zip(self._keys[::2], self._keys[1::2], strict=True):
            left = (left + _mixed(right ^ forth)) % self._left
            right = (right + _mixed(left ^ back)) % self._right
        return left * self._right + right


def shuffled_row(position: int, num_rows: int, seed: int, source: str) -> tuple[int, int]:
    """The epoch that a position in a source's endless order is in, and the row that it is.

    Every row comes once an epoch; each epoch and each source has an order of its own.
    """
    epoch, index = divmod(position, num_rows)
    return epoch, Permutation(num_rows, seed, source, epoch)(index)


def _mixed(value: int) -> int:
    """64 bits that each depend on all of the value's: the last step of splitmix64."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    value = (value ^ value >> 27) * 0x94D049BB133111EB & _MASK
    return value ^ value >> 31
