"""An answer's text as it comes, apart from the tool calls in it."""

import re

from hymba_jax.errors import HymbaError
from hymba_jax.inference.completion_stream import FinishReason
from hymba_jax.inference.tool_calls import START, ToolCall, first_call

_BEGUN = re.compile(rf"{START}\s*(\{{|\Z)")  # other text behind the mark only mentions it


class ToolCallStream:
    """Turns the deltas of an answer into its text outside of tool calls, and its calls.

    Text is held back while it may belong to a call; blanks around calls are dropped. What looks
    like a call and is none, or has no end, is text; what may have become a call when the answer was
    cut off is left out.

    Attributes:
      num_calls: found so far.
    """

    def __init__(self) -> None:
        self.num_calls = 0
        self._held = ""
        self._is_after_call = False  # and no text has come since

    def push(
        self, text: str, *, finish_reason: FinishReason | None = None
    ) -> tuple[str, list[ToolCall]]:
        """The text and the calls that are certain after one more delta.

        Args:
          finish_reason: as of `Delta`: of the answer, if nothing follows.
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
        begun = len(self._held) if finish_reason == "stop" else _call_start(self._held)
        certain = self._held[:begun]
        if begun < len(self._held) or finish_reason is None:
            certain = certain.rstrip()
        content += self._text(certain)
        self._held = self._held[len(certain) :]
        self.num_calls += len(calls)
        return content, calls

    def _text(self, text: str) -> str:
        if self._is_after_call:
            text = text.lstrip()
            self._is_after_call = not text
        return text


def _call_start(text: str) -> int:
    """Where a call has begun, or may begin at the end; the text's length if there is none."""
    if begun := _BEGUN.search(text):
        return begun.start()
    partial = (i for i in range(1, len(START)) if text.endswith(START[:i]))
    return len(text) - max(partial, default=0)
