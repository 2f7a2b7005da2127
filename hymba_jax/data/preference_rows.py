"""Rows of pairs of conversations: the chosen one and the rejected, behind one another in a row.

So a pair costs its tokens, and no padding of its own. One whose tokens do not fit a row is dropped,
or its longer side is truncated, or both to half a row; without an answer left on either side, or
with the same tokens on both, it is dropped then, too.
"""

import numpy as np

from hymba_jax.config.data import TooLong
from hymba_jax.data.batch import Batch
from hymba_jax.data.conversation_rows import ConversationRows
from hymba_jax.data.token_store import TokenStore
from hymba_jax.types import Bool, Float, Int


class PreferenceRows(ConversationRows):
    """The rows that a source's pairs are packed into, a data source for Grain.

    As of `ConversationRows`; the pairs of a row have the segment ids 1 and 2, 3 and 4, and so on,
    first the chosen side.

    Attributes:
      reference: the log-probabilities that a reference model gives the answers of the pairs in the
        rows, chosen and rejected, in any of the rows' order; batches have them once it is set.
    """

    item = "pairs"
    _sides = 2

    def __init__(self, tokens: TokenStore, length: int, too_long: TooLong = "truncate") -> None:
        super().__init__(tokens, length, too_long)
        self.reference: Float[np.ndarray, "pairs 2"] | None = None

    @property
    def num_pairs(self) -> int:
        """Those in the rows."""
        return len(self._starts)

    def pairs(self, index: int) -> list[int]:
        """The pairs of a row, in its order, by number."""
        return self._rows[index]

    def __getitem__(self, index: int) -> Batch:
        row = super().__getitem__(index)
        if self.reference is None:
            return row
        sizes = self._sizes[self._rows[index]].ravel()
        reference = np.zeros(self.length, np.float32)
        reference[np.cumsum(sizes) - sizes] = self.reference[self._rows[index]].ravel()
        return row._replace(reference_log_probs=reference)

    def _fitting(self, sizes: Int[np.ndarray, "items sides"]) -> Int[np.ndarray, "items sides"]:
        shorter = sizes.min(1, keepdims=True)
        room = np.maximum(self.length - shorter, self.length // 2)
        return np.where(sizes.sum(1, keepdims=True) > self.length, np.minimum(sizes, room), sizes)

    def _are_alike(
        self, starts: Int[np.ndarray, "items sides"], sizes: Int[np.ndarray, "items sides"]
    ) -> Bool[np.ndarray, " items"]:
        alike = sizes[:, 0] == sizes[:, 1]
        for pair in np.flatnonzero(alike):
            size = int(sizes[pair, 0])
            first, second = (
                self._tokens.read(start, start + size + 1) for start in starts[pair].tolist()
            )
            alike[pair] = np.array_equal(first, second)
        return alike
