"""The tools that an answer calls, which models write as `<toolcall> {...} </toolcall>`."""

import json
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from hymba_jax.errors import HymbaError
from hymba_jax.files import parse_json

START, END = "<toolcall>", "</toolcall>"


class ToolCall(NamedTuple):
    """A call of a tool."""

    name: str
    arguments: Mapping[str, Any]


class FoundCall(NamedTuple):
    """A call in a text, or what looks like one and is none, and the text around it."""

    before: str
    call: ToolCall | HymbaError
    after: str


def call_beginning(name: str) -> str:
    """A call of a tool as chat templates write it, up to the arguments."""
    return f'{START} {{"name": {json.dumps(name)}, "arguments":'


def parse_tool_calls(answer: str) -> tuple[str, list[ToolCall]]:
    """An answer's text outside of calls, and its calls in their order.

    Raises:
      HymbaError: a call has no end, or is not JSON with a name and arguments.
    """
    text, calls = "", list[ToolCall]()
    while found := first_call(answer):
        if isinstance(found.call, HymbaError):
            raise found.call
        text, answer = text + found.before, found.after
        calls.append(found.call)
    begun = answer.find(START)
    if begun >= 0:
        shown = answer[begun + len(START) :].strip()[:80]
        raise HymbaError(f"tool call without {END}: {shown!r}")
    return (text + answer).strip(), calls


def first_call(text: str) -> FoundCall | None:
    """The first call that has an end.

    Prose may mention the mark that begins a call: the first such mark counts from which on to the
    end it is a call.
    """
    begun = text.find(START)
    end = text.find(END, begun)
    if begun < 0 or end < 0:
        return None
    error: HymbaError | None = None
    for mark in re.finditer(START, text[:end]):
        try:
            call = _parse(text[mark.end() : end])
        except HymbaError as this:
            error = error or this
        else:
            return FoundCall(text[: mark.start()], call, text[end + len(END) :])
    assert error is not None  # there is a mark
    return FoundCall(text[:begun], error, text[end + len(END) :])


def _parse(text: str) -> ToolCall:
    shown = text.strip()[:80]
    try:
        value = parse_json(text, strict=True)
    except ValueError as error:
        raise HymbaError(f"tool call that is not JSON ({error}): {shown!r}") from error
    arguments = value.get("arguments", {}) if isinstance(value, dict) else None
    name = value.get("name") if isinstance(value, dict) else None
    if not isinstance(arguments, dict) or not (isinstance(name, str) and name.isprintable()):
        raise HymbaError(f"tool call without a name, or with arguments that are none: {shown!r}")
    return ToolCall(name, arguments)
