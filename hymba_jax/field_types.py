"""Whether a value is of a config field's type, and that type in words for people."""

import json
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
