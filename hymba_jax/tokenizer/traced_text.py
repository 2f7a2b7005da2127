"""Strings that carry the origin of each character.

A chat template is a program that works on what users wrote: it strips, splits and joins it. A
`Traced` string behaves like any other and keeps the origins through all that, so that the result
tells which characters the template wrote (`control_tokens.py` uses it).
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, SupportsIndex

from hymba_jax.tokenizer.control_tokens import TEMPLATE, USER

MAX_SUBSTRINGS = 1_000_000  # of one string

# Added to the origin of a character that a `{% generation %}` block wrote.
_GENERATED = 4
_ORIGINS, _IS_GENERATED = (
    bytes(value & mask for value in range(256)) for mask in (~_GENERATED, _GENERATED)
)


class Traced(str):
    """A string with the origin of each of its characters: TEMPLATE, ROLE or USER."""

    __slots__ = ("_origins",)
    _origins: bytes

    def __new__(cls, text: str, origins: bytes) -> "Traced":
        self = super().__new__(cls, text)
        self._origins = origins
        return self

    def __str__(self) -> "Traced":
        return self

    def __iter__(self) -> Iterator["Traced"]:
        _check_num_substrings(len(self))
        return (self[i] for i in range(len(self)))

    def __getitem__(self, key: SupportsIndex | slice) -> "Traced":
        origins = self._origins[key] if isinstance(key, slice) else bytes([self._origins[key]])
        return Traced(super().__getitem__(key), origins)

    def __mul__(self, count: SupportsIndex) -> "Traced":
        return Traced(super().__mul__(count), self._origins * count.__index__())

    __rmul__ = __mul__

    def join(self, strings: Iterable[str], /) -> "Traced":
        joined: list[str] = []
        for string in strings:
            joined += [self, string]
        return concat(joined[1:])

    def replace(self, old: str, new: str, count: SupportsIndex = -1, /) -> "Traced":
        if old not in self:
            return self
        if not old:
            return merge_origins(super().replace(old, new, count), (self, new))
        return traced(new).join(self.split(old, count))

    def lstrip(self, characters: str | None = None, /) -> "Traced":
        return self[len(self) - len(super().lstrip(characters)) :]

    def rstrip(self, characters: str | None = None, /) -> "Traced":
        return self[: len(super().rstrip(characters))]

    def strip(self, characters: str | None = None, /) -> "Traced":
        return self.rstrip(characters).lstrip(characters)

    def removeprefix(self, prefix: str, /) -> "Traced":
        return self[len(self) - len(super().removeprefix(prefix)) :]

    def removesuffix(self, suffix: str, /) -> "Traced":
        return self[: len(super().removesuffix(suffix))]

    def split(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        _check_num_substrings(self.count(sep or " "))
        return list(self._located(super().split(sep, maxsplit), len(sep or "")))

    def rsplit(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        _check_num_substrings(self.count(sep or " "))
        return list(self._located(super().rsplit(sep, maxsplit), len(sep or "")))

    def splitlines(self, keepends: bool = False) -> list[str]:
        return list(self._located(super().splitlines(keepends), 0))

    def partition(self, sep: str, /) -> tuple[str, str, str]:
        before, found, after = self._located(super().partition(sep), 0)
        return before, found, after

    def rpartition(self, sep: str, /) -> tuple[str, str, str]:
        before, found, after = self._located(super().rpartition(sep), 0)
        return before, found, after

    def capitalize(self) -> "Traced":
        return self._converted(super().capitalize())

    def lower(self) -> "Traced":
        return self._converted(super().lower())

    def title(self) -> "Traced":
        return self._converted(super().title())

    def upper(self) -> "Traced":
        return self._converted(super().upper())

    def _located(self, strings: Iterable[str], gap: int) -> Iterator["Traced"]:
        """Pieces of this string in their order, at least `gap` characters between them."""
        place = 0
        for string in strings:
            place = self.find(string, place)
            yield self[place : place + len(string)]
            place += len(string) + gap

    def _converted(self, text: str) -> "Traced":
        """`text` with the origins of this string, if each character stands for one of them."""
        if len(text) == len(self):
            return Traced(text, self._origins)
        return Traced(text, bytes([max(self._origins)]) * len(text))


def _check_num_substrings(count: int) -> None:
    if count > MAX_SUBSTRINGS:
        raise ValueError(f"a string cannot be split into more than {MAX_SUBSTRINGS:,} substrings")


def origins(text: str) -> bytes:
    """The origin of each character; a plain string is the template's."""
    return _marks(text).translate(_ORIGINS)


def generated(text: str) -> Traced:
    """The same text, marked as what a `{% generation %}` block wrote."""
    return Traced(text, bytes(mark | _GENERATED for mark in _marks(text)))


def generated_spans(text: str) -> list[tuple[int, int]]:
    """Where text that `{% generation %}` blocks wrote starts and ends."""
    is_generated = _marks(text).translate(_IS_GENERATED)
    return [match.span() for match in re.finditer(rb"[^\0]+", is_generated)]


def _marks(text: str) -> bytes:
    return text._origins if isinstance(text, Traced) else bytes(len(text))


def traced(text: str) -> Traced:
    """A string as a traced one; a plain string is the template's."""
    return text if isinstance(text, Traced) else Traced(text, bytes(len(text)))


def concat(strings: Iterable[str]) -> Traced:
    """The strings in one."""
    strings = list(strings)
    return Traced("".join(strings), b"".join(map(_marks, strings)))


def merge_origins(result: Any, sources: Any) -> Any:
    """The result of an operation on `sources` that does not track origins.

    All of a string is a user's if any source has a user's character.
    """
    if not isinstance(result, str) or isinstance(result, Traced):
        return result
    origin = USER if is_from_user(sources) else TEMPLATE
    return Traced(result, bytes([origin]) * len(result))


def is_from_user(value: Any) -> bool:
    """Whether any string in lists, tuples and mappings has a user's character."""
    if isinstance(value, str):
        return USER in origins(value)
    if isinstance(value, Mapping):
        return any(map(is_from_user, value.keys())) or any(map(is_from_user, value.values()))
    if isinstance(value, list | tuple | set | frozenset):
        return any(map(is_from_user, value))
    return isinstance(value, Iterator)  # what it will yield is not known


def trace(value: Any, origin: int) -> Any:
    """A copy of JSON-like data in which every string, keys too, has this origin."""
    if isinstance(value, str):
        return Traced(value, bytes([origin]) * len(value))
    if isinstance(value, Mapping):
        return {trace(key, origin): trace(item, origin) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [trace(item, origin) for item in value]
    return value
