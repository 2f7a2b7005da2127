"""The exception for errors that the user can fix."""

import re

# Control characters, and those that reorder the text around them.
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")


class HymbaError(Exception):
    """An error that the user can fix: what is wrong, where, and what to do, in one line.

    Commands print it and exit with status 1, without a traceback. Names from files and command
    lines may be part of it, so control characters are escaped.
    """

    def __str__(self) -> str:
        return printable(super().__str__())


def printable(text: str) -> str:
    """The text with line breaks and other control characters as escapes, such as `\\x1b`."""
    return _UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)
