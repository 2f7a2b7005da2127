"""A shard without a file."""

from pathlib import Path

import numpy as np

from hymba_jax.data.token_store import FlatShard


class ArrayShard(FlatShard):
    """Tokens in memory, one document behind another, by the name that errors call them."""

    def __init__(self, name: str, tokens: np.ndarray, eos_id: int | None = None) -> None:
        self.path, self._tokens, self._eos_id = Path(name), tokens, eos_id
        self.num_tokens = len(tokens)
