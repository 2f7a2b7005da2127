"""Configs as TOML: the fields of a dataclass by their names, those of its parts in tables.

A field `sources: Mapping[str, SourceConfig]` is any number of tables `[sources.NAME]`.
"""

import dataclasses
import difflib
import json
import os
from collections.abc import Iterator, Mapping
from typing import Any

from hymba_jax.config.field_types import misfit, shown, table_of
from hymba_jax.errors import HymbaError


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
    """TOML lines of all fields of a config, in the table named `where`."""
    values = {item.name: getattr(config, item.name) for item in dataclasses.fields(config)}
    tables = {name: value for name, value in values.items() if dataclasses.is_dataclass(value)}
    for item in dataclasses.fields(config):
        if table_of(item.type):
            named = values.pop(item.name)
            tables |= {f"{item.name}.{name}": table for name, table in named.items()}
    if where:
        yield f"\n[{where}]"
    for name, value in values.items():
        if name not in tables:
            text = json.dumps(value, ensure_ascii=False)  # valid TOML but for one character
            yield f"{name} = {text.replace('\x7f', '\\u007f')}"
    for name, value in tables.items():
        yield from toml_lines(value, f"{where}.{name}" if where else name)
