"""A config's fields: what a value of each must be, and what is wrong with one that is not.

Every config checks itself by `type_problems` and `bound_problems` when it is built, so that the
same rules hold in Python, in TOML and on the command line.
"""

import dataclasses
import json
import math
import re
import reprlib
from collections.abc import Iterator, Mapping
from types import UnionType
from typing import Any, Literal, NamedTuple, TypeAliasType, Union, get_args, get_origin

TABLE_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
"""Names that people give to tables: they become names of directories and metrics, too."""

INT64 = 2**63  # what TOML has room for, and NumPy


class Bounds(NamedTuple):
    """Bounds of a number.

    Attributes:
      at_least, at_most: the smallest and the largest valid number.
      above: why a larger one is invalid, as the end of a sentence.
      below: the same for a smaller one, if it is not obvious.
    """

    at_least: float
    at_most: float
    above: str
    below: str = ""


def plain(value: Any) -> Any:
    """The value, with NumPy and JAX scalars as Python numbers."""
    return value.item() if getattr(value, "shape", None) == () else value


def fits(value: Any, kind: Any) -> bool:
    """Whether a value is of this type.

    An integer is also a float, and NumPy scalars are what they equal; booleans are neither.
    """
    value = plain(value)
    if isinstance(kind, TypeAliasType):
        return fits(value, kind.__value__)
    if get_origin(kind) in (Union, UnionType):
        return any(fits(value, choice) for choice in get_args(kind))
    if get_origin(kind) is Literal:
        return any(type(value) is type(choice) and value == choice for choice in get_args(kind))
    if kind is type(None):
        return value is None
    if kind == tuple[str, ...]:
        return type(value) in (list, tuple) and all(type(each) is str for each in value)
    return type(value) in ((int, float) if kind is float else (kind,))


def describe(kind: Any) -> str:
    """The type in words, such as 'an integer or "auto"'."""
    if isinstance(kind, TypeAliasType):
        return describe(kind.__value__)
    if get_origin(kind) in (Union, UnionType):
        return " or ".join(map(describe, get_args(kind)))
    if get_origin(kind) is Literal:
        return " or ".join(json.dumps(choice) for choice in get_args(kind))
    return _NAMES.get(kind) or f"a {kind.__name__}"


_NAMES: dict[Any, str] = {
    int: "an integer",
    float: "a number",
    bool: "true or false",
    str: "a string",
    type(None): "nothing",
    tuple[str, ...]: "a list of strings",
}


def table_of(kind: Any) -> Any:
    """The dataclass of a field's tables by name, `Mapping[str, ...]`; None for any other field."""
    is_table = get_origin(kind) is Mapping and dataclasses.is_dataclass(get_args(kind)[1])
    return get_args(kind)[1] if is_table else None


def misfit(value: Any, kind: Any) -> str | None:
    """What is wrong with a value for a field of this type, in words; None if it is valid.

    Numbers must be finite, integers fit into 64 bits, and strings be valid Unicode.
    """
    value = plain(value)
    if not fits(value, kind):
        return f"is {shown(value)}, not {describe(kind)}"
    if type(value) is int and not -INT64 <= value < INT64:
        return f"is {shown(value)}, beyond 64 bits"
    if type(value) is float and not math.isfinite(value):
        return f"is {value}, not finite"
    strings = [value] if type(value) is str else value if type(value) in (list, tuple) else ()
    if any("\ud800" <= character <= "\udfff" for string in strings for character in string):
        return f"is {shown(value)}, not Unicode"
    return None


def type_problems(config: Any) -> Iterator[str]:
    """The fields of a config and its parts that have a value of the wrong type, in words.

    NumPy scalars among them are replaced by the Python numbers that they equal, which can be
    written to files, and lists by tuples: `config` is a frozen dataclass that is being built.
    """
    for item in dataclasses.fields(config):
        value = plain(getattr(config, item.name))
        object.__setattr__(config, item.name, value)
        if table := table_of(item.type):
            yield from _table_problems(item.name, value, table)
        elif dataclasses.is_dataclass(value) and type(value) is item.type:
            yield from type_problems(value)
        elif problem := misfit(value, item.type):
            yield f"{item.name} {problem}"
        elif type(value) is list:
            object.__setattr__(config, item.name, tuple(value))


def _table_problems(name: str, tables: Any, kind: Any) -> Iterator[str]:
    """What is wrong with a field that has tables of one dataclass by name."""
    if not isinstance(tables, Mapping):
        yield f"{name} is {shown(tables)}, not tables"
        return
    for key, table in tables.items():
        if not (type(key) is str and TABLE_NAME.fullmatch(key)):
            yield f"{name}.{shown(key)}: a name has letters, digits, - and _ only"
        elif type(table) is not kind:
            yield f"{name}.{key} is {shown(table)}, not a {kind.__name__}"
        else:
            yield from (f"{name}.{key}.{problem}" for problem in type_problems(table))


def bound_problems(config: Any, bounds: Mapping[str, Bounds]) -> Iterator[str]:
    """The numbers of a config that are outside their bounds, in words."""
    for name, limit in bounds.items():
        value = getattr(config, name)
        if type(value) not in (int, float):
            continue
        if value < limit.at_least:
            yield f"{name} is {value}, below {limit.at_least}{_because(limit.below)}"
        elif value > limit.at_most:
            yield f"{name} is {value}, above {limit.at_most}{_because(limit.above)}"


def leaves(config: Any, where: str) -> Iterator[tuple[str, Any]]:
    """Every value of a config and its parts by its dotted name, which begins with `where`."""
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if table_of(item.type):
            for name, table in value.items():
                yield from leaves(table, f"{where}{item.name}.{name}.")
        elif dataclasses.is_dataclass(value):
            yield from leaves(value, f"{where}{item.name}.")
        else:
            yield where + item.name, value


def shown(value: Any) -> str:
    """A value of any type for a message: abbreviated."""
    return _SHORT.repr(value)


class _Short(reprlib.Repr):
    def repr_int(self, x: int, level: int) -> str:
        """Python refuses to write very long numbers out."""
        return repr(x) if x.bit_length() <= 80 else f"a number of {x.bit_length()} bits"


_SHORT = _Short(maxstring=80, maxother=80)


def _because(reason: str) -> str:
    return f": {reason}" if reason else ""
