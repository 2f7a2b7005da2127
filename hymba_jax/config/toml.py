"""Configs as TOML: the fields of a dataclass by their names, those of its parts in tables.

A field `sources: Mapping[str, SourceConfig]` is any number of tables `[sources.NAME]`; if its
metadata is ARRAY, it is an array of tables that are in order and have a `name`, `[[stages]]`.
"""

import dataclasses
import difflib
import json
import os
from collections.abc import Iterator, Mapping
from typing import Any

from hymba_jax.config.field_types import misfit, shown, table_of
from hymba_jax.errors import HymbaError

ARRAY = {"array": True}


def name_tables(base: Any, table: dict[str, Any]) -> None:
    """Replaces every array of tables by tables by name, as the fields of `base` have them.

    Raises:
      HymbaError: something else is there, or a name is missing or there twice.
    """
    for item in dataclasses.fields(base):
        if item.metadata != ARRAY or item.name not in table:
            continue
        named: dict[str, Any] = {}
        for number, entry in enumerate(_tables(item.name, table[item.name]), 1):
            name = entry.pop("name", None)
            if not isinstance(name, str) or name in named:
                problem = "has no name" if name is None else f"has the name {shown(name)}"
                again = ", as another one has" if name in named else ""
                raise HymbaError(f"[[{item.name}]] number {number} {problem}{again}")
            named[name] = entry
        table[item.name] = named


def _tables(name: str, tables: Any) -> list[dict[str, Any]]:
    if not (isinstance(tables, list) and all(isinstance(entry, dict) for entry in tables)):
        raise HymbaError(f"{name} is {shown(tables)}: write tables [[{name}]], each with a name")
    return tables


def misfits(base: Any, table: dict[str, Any], where: str) -> Iterator[str]:
    """Fields of the table that `base` does not have, and values of the wrong type."""
    types = {item.name: item.type for item in dataclasses.fields(base)}
    for name, value in table.items():
        dotted = where + name
        if name not in types:
            near = difflib.get_close_matches(name, types, n=1)
            hint = f"did you mean {where}{near[0]}?" if near else f"there are {', '.join(types)}"
            yield f"unknown field {dotted}, {hint}"
        elif kind := table_of(types[name]):
            yield from _table_misfits(getattr(base, name), value, kind, dotted)
        elif dataclasses.is_dataclass(getattr(base, name)):
            if isinstance(value, dict):
                yield from misfits(getattr(base, name), value, f"{dotted}.")
            else:
                yield f"{dotted} is {shown(value)}, not a table"
        elif problem := misfit(value, types[name]):
            yield f"{dotted} {problem}"


def _table_misfits(base: Mapping[str, Any], tables: Any, kind: Any, where: str) -> Iterator[str]:
    """The same of a field that has tables of one dataclass by name."""
    if not (isinstance(tables, dict) and all(isinstance(t, dict) for t in tables.values())):
        yield f"{where} is {shown(tables)}: write tables [{where}.NAME]"
        return
    for name, table in tables.items():
        yield from misfits(base.get(name) or kind(), table, f"{where}.{name}.")


def override_from[T](path: str | os.PathLike[str], base: T, table: dict[str, Any]) -> T:
    """`base` with the values of a table, read from `path`.

    Raises:
      HymbaError: naming the file, if the values are invalid.
    """
    try:
        return _override(base, table)
    except HymbaError as error:
        raise HymbaError(f"{path}: {error}") from error


def _override[T](base: T, table: dict[str, Any]) -> T:
    """`base` with the table's values."""
    types = {item.name: item.type for item in dataclasses.fields(base)}  # type: ignore[arg-type]
    changes = {}
    for name, value in table.items():
        before = getattr(base, name)
        if kind := table_of(types[name]):
            added = {key: _override(before.get(key) or kind(), part) for key, part in value.items()}
            changes[name] = {**before, **added}
        else:
            changes[name] = _override(before, value) if isinstance(value, dict) else value
    return dataclasses.replace(base, **changes)  # type: ignore[type-var]


def toml_lines(config: Any, where: str) -> Iterator[str]:
    """TOML lines of all fields of a config that have a value, in the table named `where`."""
    if where:
        yield f"\n[{where}]"
    yield from _field_lines(config, where)


def _field_lines(config: Any, where: str) -> Iterator[str]:
    """The same without the header: first the values, as what follows a table is in it."""
    prefix = f"{where}." if where else ""
    tables: list[str] = []
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if item.metadata == ARRAY:
            for name, table in value.items():
                lines = [f"\n[[{prefix}{item.name}]]", _value_line("name", name)]
                tables += [*lines, *_field_lines(table, prefix + item.name)]
        elif table_of(item.type):
            for name, table in value.items():
                tables += toml_lines(table, f"{prefix}{item.name}.{name}")
        elif dataclasses.is_dataclass(value):
            tables += toml_lines(value, prefix + item.name)
        elif value is not None:  # of which TOML has none
            yield _value_line(item.name, value)
    yield from tables


def _value_line(name: str, value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)  # valid TOML but for one character
    return f"{name} = {text.replace('\x7f', '\\u007f')}"
