"""An answer's text as it comes, apart from the tool calls in it."""

import re

from hymba_jax.errors import HymbaError
from hymba_jax.inference.tool_calls import START, ToolCall, first_call

_BEGUN = re.compile(rf"{START}\s*(\{{|\Z)")  # other text behind the mark only mentions it


class ToolCallStream:
    """Turns the deltas of an answer into its text outside of tool calls, and its calls.

    Text is held back while it may belong to a call; blanks around calls are dropped. What looks
    like a call and is none, or has no end, is text.

    Attributes:
      num_calls: found so far.
    """

    def __init__(self) -> None:
        self.num_calls = 0
        self._held = ""
        self._is_after_call = False  # and no text has come since

    def push(self, text: str, *, last: bool = False) -> tuple[str, list[ToolCall]]:
        """The text and the calls that are certain after one more delta.

        Args:
          last: nothing follows.
        """
        self._held += text
        content, calls = "", list[ToolCall]()
        while found := first_call(self._held):
            if isinstance(found.call, HymbaError):  # not a call after all
                content += self._text(self._held.removesuffix(found.after))
            else:
                content += self._text(found.before.rstrip())
                calls.append(found.call)
                self._is_after_call = True
            self._held = found.after
        certain = len(self._held) if last else _certain_length(self._held)
        content += self._text(self._held[:certain])
        self._held = self._held[certain:]
        self.num_calls += len(calls)
        return content, calls

    def _text(self, text: str) -> str:
        if self._is_after_call:
            text = text.lstrip()
            self._is_after_call = not text
        return text


def _certain_length(text: str) -> int:
    """Characters before a call that has begun, or may begin at the end, and blanks before it."""
    begun = _BEGUN.search(text)
    if begun:
        certain = begun.start()
    else:
        partial = (i for i in range(1, len(START)) if text.endswith(START[:i]))
        certain = len(text) - max(partial, default=0)
    return len(text[:certain].rstrip())
