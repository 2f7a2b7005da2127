"""A config's fields: whether a value is of a field's type, and that type in words for people."""

import dataclasses
import json
from collections.abc import Iterator
from types import UnionType
from typing import Any, Literal, TypeAliasType, Union, get_args, get_origin


def fits(value: Any, kind: Any) -> bool:
    """Whether a value is of this type; whole numbers are numbers, booleans are not."""
    if isinstance(kind, TypeAliasType):
        return fits(value, kind.__value__)
    if get_origin(kind) in (Union, UnionType):
        return any(fits(value, choice) for choice in get_args(kind))
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    return type(value) in ((int, float) if kind is float else (kind,))


def describe(kind: Any) -> str:
    """The type in words, such as 'a whole number or "auto"'."""
    if isinstance(kind, TypeAliasType):
        return describe(kind.__value__)
    if get_origin(kind) in (Union, UnionType):
        return " or ".join(map(describe, get_args(kind)))
    if get_origin(kind) is Literal:
        return " or ".join(json.dumps(choice) for choice in get_args(kind))
    return {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}[kind]


def leaves(config: Any, where: str) -> Iterator[tuple[str, Any]]:
    """Every value of a config and its parts by its dotted name, which begins with `where`."""
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if dataclasses.is_dataclass(value):
            yield from leaves(value, f"{where}{item.name}.")
        else:
            yield where + item.name, value
