r"""Strings of the command line in which `\n` is a line break."""

import re
from typing import Annotated

from tyro.constructors import PrimitiveConstructorSpec

from hymba_jax.errors import HymbaError

_ESCAPE = re.compile(
    r"\\(?:[\\nrt]|x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8}|(?P<unknown>.|$))", re.DOTALL
)


def unescape(text: str) -> str:
    r"""The text of a stop string on the command line: `\n` is a line break, `\\` a backslash.

    There are `\n`, `\r`, `\t`, `\\`, `\xHH`, `\uHHHH` and `\UHHHHHHHH`.

    Raises:
      HymbaError: it has another escape.
    """

    def character(escape: re.Match[str]) -> str:
        if escape["unknown"] is None:
            try:
                return escape[0].encode().decode("unicode_escape")
            except UnicodeDecodeError:
                pass  # beyond Unicode
        raise HymbaError(
            f"stop {text!r}: {escape[0]} is not an escape; valid are \\n, \\r, \\t, \\\\, \\xHH, "
            "\\uHHHH and \\UHHHHHHHH, and a backslash is written \\\\"
        )

    return _ESCAPE.sub(character, text)


EscapedStr = Annotated[
    str,
    PrimitiveConstructorSpec(
        nargs=1,
        metavar="STR",
        instance_from_str=lambda arguments: unescape(arguments[0]),
        is_instance=lambda value: isinstance(value, str),
        str_from_instance=lambda value: [value],
    ),
]
"""A string, which the command line passes through `unescape`."""
