"""States after the beginnings of prompts, so that conversations are not prefilled again every turn.

The state of SSM heads can be taken up only where it was kept, unlike keys and values. States are
kept after whole chunks of a prompt, where chunked prefill stops anyway: what follows is then
computed by the same programs on the same numbers as without the cache, to the bit. A turn so costs
its new tokens, the answer before them, and less than a chunk.

Kept are the last such state of each prompt, where its next turn goes on, and the last one that it
shares with an earlier prompt, as of a system message: where prompts part is found out when the
second one comes, and used by the third.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

from hymba_jax.inference.batch_state import Prefilled
from hymba_jax.inference.engine import Engine

MAX_KNOWN = 100_000  # beginnings of prompts that are remembered, 16 bytes each


class PrefixCache:
    """Some states by the tokens that they are after; the least recently used one goes first.

    Args:
      chunk: tokens of each chunk of a prompt but the last.
      max_states: states that are kept.

    Attributes:
      queried_tokens: of the prompts that were looked up.
      hit_tokens: those of them that need not be prefilled.
    """

    def __init__(self, chunk: int, max_states: int) -> None:
        self._chunk, self._max_states = chunk, max_states
        self._states: OrderedDict[bytes, Prefilled] = OrderedDict()
        self._known: OrderedDict[bytes, None] = OrderedDict()
        self.queried_tokens = self.hit_tokens = 0

    def look_up(self, prompt: Sequence[int]) -> tuple[int, Prefilled | None, dict[int, bytes]]:
        """What is known of a prompt.

        Returns:
          The number of its tokens that a kept state is after, and the state, which must be copied
          before it is donated; and after how many tokens `keep` is to be called, with which key.
        """
        if not self._max_states:
            return 0, None, {}
        keys = self._keys(prompt)
        lengths = [(i + 1) * self._chunk for i in range(len(keys))]
        hits = [i for i, key in enumerate(keys) if key in self._states]
        shared = [i for i, key in enumerate(keys) if key in self._known]
        wanted = {*shared[-1:], *range(len(keys))[-1:]} - {*hits}
        for key in keys:
            self._known[key] = None
            self._known.move_to_end(key)
        while len(self._known) > MAX_KNOWN:
            self._known.popitem(last=False)
        self.queried_tokens += len(prompt)
        to_keep = {lengths[i]: keys[i] for i in sorted(wanted)}
        if not hits:
            return 0, None, to_keep
        self._states.move_to_end(keys[hits[-1]])
        self.hit_tokens += lengths[hits[-1]]
        return lengths[hits[-1]], self._states[keys[hits[-1]]], to_keep

    def keep(self, key: bytes, state: Prefilled) -> None:
        """Keeps a state, which nobody else may donate."""
        self._states[key] = state
        self._states.move_to_end(key)
        while len(self._states) > self._max_states:
            self._states.popitem(last=False)

    def prefill(self, engine: Engine, prompt: Sequence[int], context: int) -> Prefilled:
        """As `Engine.prefill` of one prompt, from the longest beginning whose state is kept.

        Args:
          engine: whose chunks are this cache's.
          context: tokens that the sequence may grow to; the same bucket in every call.
        """
        length, kept, to_keep = self.look_up(prompt)
        state = engine.repeat(kept, [0]) if kept else engine.init_prefill(1, context)
        for chunk in engine.chunks([prompt[length:]]):
            state = engine.prefill_chunk(state, chunk, is_start=not length)
            length += int(chunk.lengths[0])
            if key := to_keep.get(length):
                self.keep(key, engine.repeat(state, [0]))
        return state

    def clear(self) -> None:
        """Forgets all prompts."""
        self._states.clear()
        self._known.clear()
        self.queried_tokens = self.hit_tokens = 0

    def _keys(self, prompt: Sequence[int]) -> list[bytes]:
        """A digest of each beginning of whole chunks that a token follows."""
        tokens, digest, keys = np.asarray(prompt, np.int32), hashlib.blake2b(digest_size=16), []
        for start in range(0, len(tokens) - self._chunk, self._chunk):
            digest.update(tokens[start : start + self._chunk].tobytes())
            keys.append(digest.digest())
        return keys
