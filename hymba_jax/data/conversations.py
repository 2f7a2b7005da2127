"""Records that are conversations, rendered by the tokenizer's chat template.

| fields                        | values                                                     |
|-------------------------------|------------------------------------------------------------|
| `messages`                    | objects with `role`, `content` and what the template reads |
| or `conversations`            | objects with `from` (human, gpt, system, tool) and `value` |
| or `prompt` and `completion`  | strings, or lists like `messages`; the loss is on answers  |
|                               | of the completion alone                                    |
| with them `system`            | a string, the system message                               |
| `tools`, `contexts`           | JSON schemas (a list, or JSON as text); strings            |
| `documents`                   | objects, as the template reads them                        |

Of a record with several of the first three, the first of them is read. Arguments of tool calls may
be JSON as text; templates are given objects. `chat_template_kwargs` are refused.
"""

import json
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from hymba_jax.config.data import LossOn
from hymba_jax.data import records
from hymba_jax.data.records import BrokenFile, WrongColumns
from hymba_jax.errors import HymbaError
from hymba_jax.files import parse_json_object
from hymba_jax.tokenizer import Tokenizer
from hymba_jax.tokenizer.answers import AnswerRenderer, ChatText
from hymba_jax.tokenizer.chat_template import TemplateFailed

OPTION_FIELDS = ("system", "tools", "contexts", "documents", "chat_template_kwargs")
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
        system = record.get("system") or ""
        if not isinstance(system, str):
            raise ValueError("system is not a string: fix it")
        if system.strip():
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
        """Raises ValueError if the template leaves out what is in a record.

        That is an option, the system message, the result of a tool, tool calls, or content beside
        them; an answer without calls has its own check where it is told from the rest.
        """

        def is_ignored(name: str) -> bool:
            others = {other: value for other, value in options.items() if other != name}
            try:
                return self._renderer.text(messages, **others) == text
            except HymbaError:  # the template needs it
                return False

        unwritten = [*filter(is_ignored, options), *self._unwritten_parts(messages, options)]
        if unwritten:
            raise ValueError(
                f"the chat template does not write {' and '.join(unwritten)}: remove the record, "
                "or give a template that does"
            )

    def _unwritten_parts(
        self, messages: Sequence[Mapping[str, Any]], options: Mapping[str, Any]
    ) -> Iterator[str]:
        """The parts of messages that are not in the text, by one rendering with marks for them."""
        parts: dict[str, str] = {}

        def mark(part: str) -> str:
            """A text that stands for a part; digits, which have no case that could be changed."""
            digits = f"{secrets.randbelow(10**32):032}"
            parts[digits] = part
            return digits

        marked = [_marked(message, number, mark) for number, message in enumerate(messages, 1)]
        if parts:
            try:
                text = self._renderer.text(marked, **options)
            except HymbaError:  # the template needs what is there
                return
            yield from dict.fromkeys(part for digits, part in parts.items() if digits not in text)

    def of_row(self, row: dict[str, Any]) -> ChatText:
        """The conversation in a row of Parquet. Raises ValueError saying what is wrong.

        Its nulls are fields that this record does not have, and others of their column do.
        """
        return self.of_json(without_nulls(row))

    def columns(self, schema: Any) -> list[str]:
        """The columns that conversations are in. Raises WrongColumns if there are none."""
        found = [name for name in _FIELDS if name in schema.names]
        if not {"messages", "conversations", "completion"} & {*found}:
            columns = ", ".join(map(repr, schema.names)) or "none"
            raise WrongColumns(f"no columns {_NEEDED} (it has: {columns}): rename them")
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
    if calls := message.get("tool_calls"):
        if not isinstance(calls, list):
            raise ValueError(f"message {number} has tool_calls that are no list: fix it")
        message["tool_calls"] = [_checked_call(call, number) for call in calls]
    return message


def _checked_call(call: Any, number: int) -> dict[str, Any]:
    """A tool call with its arguments, if it has any, as an object.

    OpenAI's format has them as text, which a template would write as a string: no call that
    inference can parse. Blank text and null are no arguments.
    """
    function = (call.get("function") or call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ValueError(f"message {number} has a tool call without the name of a function: fix it")
    arguments = function.get("arguments", {})
    if arguments is None or (isinstance(arguments, str) and not arguments.strip()):
        return _with_function(call, arguments={})
    if isinstance(arguments, str):
        try:
            arguments = parse_json_object(arguments)
        except ValueError as error:
            raise ValueError(
                f"message {number} calls {function['name']!r} with arguments that are a string, "
                f"but no JSON object ({error}): fix it"
            ) from error
        return _with_function(call, arguments=arguments)
    if not isinstance(arguments, dict):
        raise ValueError(
            f"message {number} calls {function['name']!r} with arguments that are no object: fix it"
        )
    return dict(call)


def _with_function(call: Mapping[str, Any], **fields: Any) -> dict[str, Any]:
    """A tool call whose function has other values of some fields."""
    if call.get("function"):
        return {**call, "function": {**call["function"], **fields}}
    return {**call, **fields}


def _marked(
    message: Mapping[str, Any], number: int, mark: Callable[[str], str]
) -> Mapping[str, Any]:
    """A message with marks for the texts that a template may leave out."""
    role, calls = message["role"], message.get("tool_calls", ())
    if role == "user" or (role == "assistant" and not calls):
        return message

    def of_text(text: Any) -> Any:
        is_blank = not isinstance(text, str) or not text.strip()
        return text if is_blank else mark(f"the content of message {number}")

    content = message.get("content", "")
    if isinstance(content, str):
        content = of_text(content)
    else:
        content = [
            part | {"text": of_text(part["text"])}
            if isinstance(part, dict) and "text" in part
            else part
            for part in content
        ]
    marked = {**message, "content": content} if content else {**message}
    if calls:
        what = f"the tool calls of message {number}"
        marked["tool_calls"] = [_with_function(call, name=mark(what)) for call in calls]
    return marked


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
    """The tools, contexts and documents of a record, as the template takes them."""
    if record.get("chat_template_kwargs"):
        raise ValueError("has chat_template_kwargs, which are not supported: remove them")
    values = {name: record.get(name) for name in ("tools", "contexts", "documents")}
    if isinstance(tools := values["tools"], str):
        try:
            values["tools"] = json.loads(tools) if tools.strip() else None
        except ValueError as error:
            raise ValueError(f"tools is a string, but not JSON ({error}): fix it") from error
    options: dict[str, Any] = {name: value for name, value in values.items() if value}
    for name, value in options.items():
        kind, what = (str, "strings") if name == "contexts" else (dict, "objects")
        if not isinstance(value, list) or not all(isinstance(each, kind) for each in value):
            raise ValueError(f"{name} is not a list of {what}: fix it")
    return options
