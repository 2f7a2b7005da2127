"""Records that are preferences: a prompt with a chosen and a rejected answer to it.

| fields                        | values                                                     |
|-------------------------------|------------------------------------------------------------|
| `prompt`                      | a string, or a list of messages                            |
| `chosen`, `rejected`          | strings, or lists of messages, from an answer on           |
| or `chosen`, `rejected` alone | whole conversations, which begin with the same prompt      |
| with them                     | `system`, `tools` and others, as of `conversations.py`     |

A pair is two conversations with the same prompt. The loss is on answers behind it alone.
"""

from collections.abc import Iterator, Mapping
from itertools import takewhile
from typing import Any

from hymba_jax.config.data import LossOn
from hymba_jax.data.conversations import (
    OPTION_FIELDS,
    Conversations,
    side_messages,
    without_nulls,
)
from hymba_jax.data.records import BrokenFile, WrongColumns
from hymba_jax.tokenizer import Tokenizer
from hymba_jax.tokenizer.answers import ChatPair, ChatText

_SIDES = ("chosen", "rejected")
_NEEDED = '"chosen" and "rejected"'


class Preferences:
    """Pairs of conversations, as the content of records.

    Args:
      loss_on: all answers behind the prompt, or the last one of each side.
      template: where the tokenizer's template is from, for messages.

    Attributes:
      options: what decides the documents beside the files and the tokenizer.

    Raises:
      HymbaError: as of `Conversations`.
    """

    def __init__(self, tokenizer: Tokenizer, loss_on: LossOn, template: str) -> None:
        self._conversations = Conversations(tokenizer, loss_on, template)
        self.options = {"format": "preference", "loss_on": loss_on}

    def of_json(self, value: Any) -> ChatPair:
        """The pair in a JSON value. Raises ValueError saying what is wrong."""
        if not isinstance(value, dict):
            raise ValueError(f"not a JSON object: write one with {_NEEDED}")
        if not {*_SIDES} <= value.keys():
            fields = ", ".join(map(repr, value)) or "none"
            raise ValueError(f"no {_NEEDED} (it has: {fields}): rename its fields")
        prompt, *sides = _split(value)
        chosen, rejected = (
            self._render(name, value, prompt, side)
            for name, side in zip(_SIDES, sides, strict=True)
        )
        if chosen.text == rejected.text:
            raise ValueError("chosen and rejected are equal: fix it or remove the record")
        return ChatPair(chosen, rejected)

    def _render(
        self, name: str, record: Mapping[str, Any], prompt: list[Any], side: list[Any]
    ) -> ChatText:
        try:
            return self._conversations.render(record, [*prompt, *side], num_given=len(prompt))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error

    def of_row(self, row: dict[str, Any]) -> ChatPair:
        """The pair in a row of Parquet. Raises ValueError saying what is wrong."""
        return self.of_json(without_nulls(row))

    def columns(self, schema: Any) -> list[str]:
        """The columns that pairs are in. Raises WrongColumns if there are none."""
        if not {*_SIDES} <= {*schema.names}:
            columns = ", ".join(map(repr, schema.names)) or "none"
            raise WrongColumns(f"no columns {_NEEDED} (it has: {columns}): rename them")
        return [name for name in ("prompt", *_SIDES, *OPTION_FIELDS) if name in schema.names]

    def of_file(self, blocks: Iterator[bytes]) -> Iterator[str]:
        """Raises BrokenFile: a text file has no pairs."""
        raise BrokenFile("no preferences: give .jsonl, .json or Parquet, or take it out")


def _split(record: Mapping[str, Any]) -> tuple[list[Any], list[Any], list[Any]]:
    """The messages of the prompt, and those of each side behind it."""
    if "prompt" in record:
        prompt = side_messages(record, "prompt", "user")
        chosen, rejected = (_behind(prompt, record, name) for name in _SIDES)
        return prompt, chosen, rejected
    for name in _SIDES:
        if isinstance(record[name], str):
            raise ValueError(f"{name!r} is text, and there is no 'prompt': add it")
    chosen, rejected = (side_messages(record, name, "assistant") for name in _SIDES)
    pairs = zip(chosen[:-1], rejected[:-1], strict=False)
    common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    for side in (chosen, rejected):
        if (role := _role(side[common])) != "assistant":
            raise ValueError(
                f"the prompts of chosen and rejected differ, in message {common + 1}, of {role!r}: "
                "fix it or remove the record"
            )
    return chosen[:common], chosen[common:], rejected[common:]


def _behind(prompt: list[Any], record: Mapping[str, Any], name: str) -> list[Any]:
    """The messages of a side behind the prompt, which it may begin with."""
    side = side_messages(record, name, "assistant")
    if _role(side[0]) == "assistant":
        return side
    if side[: len(prompt)] != prompt or len(side) == len(prompt):
        raise ValueError(
            f"{name!r} begins with another prompt than 'prompt', or has no answer: fix it or "
            "remove the record"
        )
    return side[len(prompt) :]


def _role(message: Any) -> Any:
    return message.get("role") if isinstance(message, dict) else None
