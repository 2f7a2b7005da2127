"""Records that are conversations, rendered by the tokenizer's chat template.

| fields                        | values                                                     |
|-------------------------------|------------------------------------------------------------|
| `messages`                    | objects with `role`, `content` and what the template reads |
| or `conversations`            | objects with `from` (human, gpt, system, tool) and `value` |
| or `prompt` and `completion`  | strings, or lists like `messages`; the loss is on answers  |
|                               | of the completion alone                                    |
| with them `system`            | a string, the system message                               |
| `tools`, `contexts`           | JSON schemas (a list, or JSON as text); strings            |

Of a record with several of the first three, the first of them is read.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hymba_jax.config.data import LossOn
from hymba_jax.data import records
from hymba_jax.data.records import BrokenFile
from hymba_jax.errors import HymbaError
from hymba_jax.tokenizer import Tokenizer
from hymba_jax.tokenizer.answers import AnswerRenderer, ChatText
from hymba_jax.tokenizer.chat_template import TemplateFailed

OPTION_FIELDS = ("system", "tools", "contexts")
_FIELDS = ("messages", "conversations", "prompt", "completion", *OPTION_FIELDS)
_NEEDED = '"messages", "conversations", or "prompt" and "completion"'

_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
}
"""The role of each `from` of ShareGPT's format."""

_AFTER = {
    "": ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}
"""The roles that may follow each, of the first message that of no message."""


class Conversations:
    """Conversations, as the content of records.

    Args:
      loss_on: all answers, or the last one of each.
      template: where the tokenizer's template is from, for messages.

    Attributes:
      options: what decides the documents beside the files and the tokenizer.

    Raises:
      HymbaError: the tokenizer has no chat template, or one whose answers cannot be told.
    """

    def __init__(self, tokenizer: Tokenizer, loss_on: LossOn, template: str) -> None:
        if not tokenizer.chat_templates:
            raise HymbaError(
                f"{template}: has no chat template, which conversations are rendered by: give the "
                "file of one, hymba tokenize --chat-template or hymba train --data.chat-template"
            )
        try:
            self._renderer = AnswerRenderer(tokenizer, loss_on)
        except HymbaError as error:
            raise HymbaError(f"{template}: {error}") from error
        self.options = {"format": "chat", "loss_on": loss_on}

    def of_json(self, value: Any) -> ChatText:
        """The conversation in a JSON value. Raises ValueError saying what is wrong."""
        if not isinstance(value, dict):
            raise ValueError(f"not a JSON object: write one with {_NEEDED}")
        return self.render(value, *_messages(value))

    def render(
        self, record: Mapping[str, Any], messages: Sequence[Any], num_given: int = 0
    ) -> ChatText:
        """A conversation, with the options of a record. Raises ValueError saying what is wrong.

        Args:
          num_given: messages at the start whose answers are not meant.
        """
        if isinstance(system := record.get("system"), str) and system.strip():
            messages = [{"role": "system", "content": system}, *messages]
            num_given += 1
        messages = [_checked(message, number) for number, message in enumerate(messages, start=1)]
        _check_order(messages)
        options = _options(record)
        try:
            json.dumps([messages, options], ensure_ascii=False, default=str).encode()
            chat = self._renderer.render(messages, num_given, **options)
            self._check_written(chat.text, messages, options)
        except UnicodeEncodeError as error:
            raise ValueError("holds half a surrogate pair, which is no text: fix it") from error
        except TemplateFailed as error:
            raise ValueError(f"{error}: fix or remove it") from error
        except HymbaError as error:
            raise ValueError(str(error)) from error
        if len(chat.text) > records.PIECE:
            raise ValueError(f"a conversation of more than {records.PIECE:,} characters: remove it")
        return chat

    def _check_written(
        self, text: str, messages: Sequence[Mapping[str, Any]], options: Mapping[str, Any]
    ) -> None:
        """Raises ValueError if the template leaves tools, contexts or calls of a record out."""

        def is_ignored(name: str) -> bool:
            others = {other: value for other, value in options.items() if other != name}
            try:
                return self._renderer.text(messages, **others) == text
            except HymbaError:  # the template needs it
                return False

        unwritten = [*filter(is_ignored, options)]
        unwritten += [
            f"the tool calls of message {number}"
            for number, message in enumerate(messages, start=1)
            if any(name not in text for name in _called(message))
        ]
        if unwritten:
            raise ValueError(
                f"the chat template does not write {' and '.join(unwritten)}: remove the record, "
                "or give a template that does"
            )

    def of_row(self, row: dict[str, Any]) -> ChatText:
        """The conversation in a row of Parquet. Raises ValueError saying what is wrong.

        Its nulls are fields that this record does not have, and others of their column do.
        """
        return self.of_json(without_nulls(row))

    def columns(self, schema: Any) -> list[str]:
        """The columns that conversations are in. Raises BrokenFile if there are none."""
        found = [name for name in _FIELDS if name in schema.names]
        if not {"messages", "conversations", "completion"} & {*found}:
            columns = ", ".join(map(repr, schema.names)) or "none"
            raise BrokenFile(f"no columns {_NEEDED} (it has: {columns}): rename them")
        return found

    def of_file(self, blocks: Iterator[bytes]) -> Iterator[str]:
        """Raises BrokenFile: a text file has no conversations."""
        raise BrokenFile("no conversations: give .jsonl, .json or Parquet, or take it out")


def without_nulls(value: Any) -> Any:
    """The value without null fields, at every depth."""
    if isinstance(value, dict):
        return {name: without_nulls(each) for name, each in value.items() if each is not None}
    return [*map(without_nulls, value)] if isinstance(value, list) else value


def _messages(record: Mapping[str, Any]) -> tuple[list[Any], int]:
    """The messages of a record, whatever its format, and how many of them are its prompt."""
    if "messages" in record:
        return _list(record, "messages"), 0
    if "conversations" in record:
        return [*map(_from_sharegpt, _list(record, "conversations"))], 0
    if "prompt" in record and "completion" in record:
        prompt = side_messages(record, "prompt", "user")
        return [*prompt, *side_messages(record, "completion", "assistant")], len(prompt)
    fields = ", ".join(map(repr, record)) or "none"
    raise ValueError(f"no {_NEEDED} (it has: {fields}): rename its fields")


def _list(record: Mapping[str, Any], field: str) -> list[Any]:
    if not isinstance(record[field], list) or not record[field]:
        raise ValueError(f"{field!r} is not a list of messages, or empty: fix it")
    return list(record[field])


def side_messages(record: Mapping[str, Any], field: str, role: str) -> list[Any]:
    """The messages of a prompt or a completion, which may be the text of one."""
    if isinstance(record[field], str):
        return [{"role": role, "content": record[field]}]
    return _list(record, field)


def _from_sharegpt(message: Any) -> Any:
    """The message with its role and content under our names, if it has them."""
    if not isinstance(message, dict) or not {"from", "value"} <= message.keys():
        return message
    role = message["from"]
    renamed = {"role": _ROLES.get(role, role) if isinstance(role, str) else role}
    return renamed | {"content": message["value"]}


def _checked(message: Any, number: int) -> dict[str, Any]:
    """A message whose values are of the right types; null is as if it were not there."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise ValueError(f"message {number} is not an object with a role and a content: fix it")
    message = {key: value for key, value in message.items() if value is not None}
    content = message.get("content", "")
    if not isinstance(content, str | list):
        raise ValueError(
            f"message {number} has a content that is neither a string nor a list of parts: fix it"
        )
    is_blank = not content.strip() if isinstance(content, str) else not content
    if message["role"] == "assistant" and is_blank and not message.get("tool_calls"):
        raise ValueError(f"message {number} is an empty answer: fill it in or remove the record")
    if "content" not in message and message["role"] != "assistant":
        raise ValueError(f"message {number} has no content: fill it in or remove the record")
    if is_blank and message["role"] == "user":
        raise ValueError(f"message {number} is empty: fill it in or remove the record")
    if message.get("weight", 1) != 1:
        raise ValueError(
            f"message {number} has weight {message['weight']}, which is not supported: remove the "
            'record, or choose its last answer by loss_on "last"'
        )
    return message


def _called(message: Mapping[str, Any]) -> Iterator[str]:
    """The names of the functions that a message calls."""
    calls = message.get("tool_calls")
    for call in calls if isinstance(calls, list) else ():
        function = call.get("function", call) if isinstance(call, dict) else call
        if isinstance(function, dict) and isinstance(name := function.get("name"), str):
            yield name


def _check_order(messages: Sequence[Mapping[str, Any]]) -> None:
    """Raises ValueError unless roles follow one another as `_AFTER` has it, up to an answer."""
    before = ""
    for number, message in enumerate(messages, start=1):
        role = message["role"]
        if role not in _AFTER or not role:
            roles = ", ".join(filter(None, _AFTER))
            raise ValueError(f"message {number} has role {role!r}, not one of {roles}: fix it")
        if role not in _AFTER[before]:
            where = f"after {before!r}" if before else "at the start"
            raise ValueError(
                f"roles out of order: message {number} is of {role!r} {where}, where "
                f"{' or '.join(map(repr, _AFTER[before]))} belongs: fix it"
            )
        before = role
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError("no answer: no message is of 'assistant': add one or remove the record")
    if before != "assistant":
        raise ValueError(f"the last message is of {before!r}, not an answer: remove it")


def _options(record: Mapping[str, Any]) -> dict[str, Any]:
    """The tools and contexts of a record, as the template takes them."""
    options: dict[str, Any] = {}
    tools, contexts = record.get("tools"), record.get("contexts")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else None
        except ValueError as error:
            raise ValueError(f"tools is a string, but not JSON ({error}): fix it") from error
    if tools:
        if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
            raise ValueError("tools is not a list of objects: fix it")
        options["tools"] = tools
    if contexts:
        if not isinstance(contexts, list) or not all(isinstance(each, str) for each in contexts):
            raise ValueError("contexts is not a list of strings: fix it")
        options["contexts"] = contexts
    return options
