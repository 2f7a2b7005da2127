"""Documents from Parquet: a string column, row by row."""

from collections.abc import Iterator
from io import BufferedIOBase
from typing import Any

from hymba_jax.data import records
from hymba_jax.data.records import BrokenFile, Document, Problem, pieces
from hymba_jax.errors import HymbaError

# Rows that are in memory at once.
_ROWS = 64


def read_parquet(file: BufferedIOBase, name: str, column: str) -> Iterator[Document | Problem]:
    """The documents of a column.

    Raises:
      BrokenFile: there is no such column of strings, or the file is broken from here on.
      HymbaError: pyarrow is not installed.
      OSError: the file cannot be read.
    """
    try:
        import pyarrow
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise HymbaError(
            f"{name}: reading Parquet takes pyarrow: pip install 'hymba_jax[parquet]'"
        ) from error
    try:
        # By default, the whole column of a row group is read at once.
        table = ParquetFile(file, buffer_size=records.BLOCK, pre_buffer=False)
        _refuse_column(table.schema_arrow, column)
        number = 0
        for batch in table.iter_batches(_ROWS, columns=[column], use_threads=False):
            for value in batch.column(0):
                number += 1
                yield from _row(f"{name}:row {number}", value)
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # of the file itself: Arrow's have no number
        reason = str(error).partition("\n")[0]
        raise BrokenFile(f"broken Parquet ({reason}): copy the file again") from error


def _refuse_column(schema: Any, column: str) -> None:
    from pyarrow import types

    index = schema.get_field_index(column)
    if index < 0:
        columns = ", ".join(map(repr, schema.names)) or "none"
        raise BrokenFile(f"no column {column!r} (it has: {columns}): set text_field")
    kind = schema.field(index).type
    kind = kind.value_type if types.is_dictionary(kind) else kind
    if str(kind) not in ("string", "large_string", "string_view"):
        raise BrokenFile(f"column {column!r} is {kind}, not string: convert it or set text_field")


def _row(name: str, value: Any) -> Iterator[Document | Problem]:
    try:
        text = value.as_py()
    except UnicodeDecodeError as error:
        yield Problem(name, f"not UTF-8 text (byte {error.start}): fix or remove the row")
        return
    if text is None:
        yield Problem(name, "null instead of text: fill in or remove the row")
    elif len(text) > records.LARGEST_RECORD:
        yield Problem(name, records.TOO_LARGE)
    else:
        yield from pieces(name, [text])
