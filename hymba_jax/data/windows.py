"""Windows of one stream of documents, as the paper trains on.

Window i covers the `length + 1` tokens from `i * length`: neighbours share one token, the last
target of one and the first input of the next, so that every token but the stream's first is a
target exactly once.
"""

from hymba_jax.data.batch import Batch, make_row
from hymba_jax.data.token_store import TokenStore


class Windows:
    """The windows of a stream as rows of batches, by index.

    Args:
      length: positions of a row.
      keep_last: whether what is left after the last whole window is a row, too, with padding.

    Attributes:
      num_targets: tokens that are predicted, in all rows.
    """

    def __init__(self, tokens: TokenStore, length: int, *, keep_last: bool = False) -> None:
        self._tokens, self._length = tokens, length
        targets = tokens.num_tokens - 1
        self.num_targets = targets if keep_last else targets // length * length
        self._num_rows = -(-self.num_targets // length)

    def __len__(self) -> int:
        return self._num_rows

    def __getitem__(self, index: int) -> Batch:
        start = index * self._length
        stop = min(start + self._length + 1, self._tokens.num_tokens)
        return make_row(self._tokens.read(start, stop), self._length)
