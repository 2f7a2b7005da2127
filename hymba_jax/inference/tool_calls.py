"""The tools that an answer calls, which models write as `<toolcall> {...} </toolcall>`."""

import json
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from hymba_jax.errors import HymbaError

START, END = "<toolcall>", "</toolcall>"
_CALL = re.compile(rf"{START}(.*?)({END}|\Z)", re.DOTALL)


class ToolCall(NamedTuple):
    """A call of a tool."""

    name: str
    arguments: Mapping[str, Any]


def parse_tool_calls(answer: str) -> tuple[str, list[ToolCall]]:
    """An answer's text outside of calls, and its calls in their order.

    Raises:
      HymbaError: a call has no end, or is not JSON with a name and arguments.
    """
    calls = [_parse(match[1], is_closed=bool(match[2])) for match in _CALL.finditer(answer)]
    return _CALL.sub("", answer).strip(), calls


def _parse(text: str, *, is_closed: bool) -> ToolCall:
    shown = text.strip()[:80]
    if not is_closed:
        raise HymbaError(f"tool call without {END}: {shown!r}")
    try:
        value = json.loads(text)
    except ValueError as error:
        raise HymbaError(f"tool call that is not JSON ({error}): {shown!r}") from error
    arguments = value.get("arguments", {}) if isinstance(value, dict) else None
    if not isinstance(arguments, dict) or not isinstance(value.get("name"), str):
        raise HymbaError(f"tool call without a name, or with arguments that are none: {shown!r}")
    return ToolCall(value["name"], arguments)
