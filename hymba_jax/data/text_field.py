"""Records whose document is the text in one field."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

from hymba_jax.data import records
from hymba_jax.data.records import WrongColumns, decode

_SET_FIELD = "set data.text_field (--data.text-field)"


@dataclass(frozen=True)
class TextField:
    """The text in a field of a JSON object, or in a column of Parquet; or all of a text file.

    Attributes:
      name: of the field or the column.
    """

    name: str = "text"

    @property
    def options(self) -> dict[str, str]:
        """What decides the documents beside the files."""
        return {"text_field": self.name}

    def of_json(self, value: Any) -> str:
        """The text in a JSON value. Raises ValueError saying what is wrong and what to do."""
        if not isinstance(value, dict):
            raise ValueError('not a JSON object: write {"' + self.name + '": "..."}')
        if self.name not in value:
            fields = ", ".join(map(repr, value)) or "none"
            raise ValueError(f"no field {self.name!r} (it has: {fields}): {_advice(value)}")
        text = value[self.name]
        if not isinstance(text, str):
            raise ValueError(f"field {self.name!r} is not a string: fix it or {_SET_FIELD}")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"field {self.name!r} holds half a surrogate pair, which is no text: fix it"
            ) from error
        return text

    def of_row(self, row: dict[str, Any]) -> str:
        """The text in a row. Raises ValueError saying what is wrong and what to do."""
        text = row[self.name]
        if text is None:
            raise ValueError("null instead of text: fill in or remove the row")
        if len(text) > records.LARGEST_RECORD:
            raise ValueError(records.TOO_LARGE)
        return str(text)

    def columns(self, schema: Any) -> list[str]:
        """The column of the text. Raises WrongColumns if there is no such column of strings."""
        from pyarrow import types

        index = schema.get_field_index(self.name)
        if index < 0:
            columns = ", ".join(map(repr, schema.names)) or "none"
            advice = _advice(schema.names)
            raise WrongColumns(f"no column {self.name!r} (it has: {columns}): {advice}")
        kind = schema.field(index).type
        kind = kind.value_type if types.is_dictionary(kind) else kind
        if str(kind) not in ("string", "large_string", "string_view"):
            raise WrongColumns(
                f"column {self.name!r} is {kind}, not string: convert it or {_SET_FIELD}"
            )
        return [self.name]

    def of_file(self, blocks: Iterator[bytes]) -> Iterator[str]:
        """All of a text file."""
        return decode(blocks)


def _advice(fields: Collection[str]) -> str:
    """What to do about records of these fields, which have no text."""
    if "chosen" in fields and "rejected" in fields:
        return "set data.format to preference"
    if "messages" in fields or "conversations" in fields or "completion" in fields:
        return "set data.format to chat"
    return _SET_FIELD
