"""Documents from Parquet, row by row."""

from collections.abc import Iterator
from io import BufferedIOBase
from typing import Any

from hymba_jax.data import records
from hymba_jax.data.records import BrokenFile, Content, Document, Problem, documents
from hymba_jax.errors import HymbaError

# Rows that are in memory at once.
_ROWS = 64


def read_parquet(file: BufferedIOBase, name: str, content: Content) -> Iterator[Document | Problem]:
    """The documents of all rows.

    Raises:
      BrokenFile: the columns that they are in are not there, or the file is broken from here on.
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
        columns = content.columns(table.schema_arrow)
        number = 0
        for batch in table.iter_batches(_ROWS, columns=columns, use_threads=False):
            for values in zip(*map(batch.column, columns), strict=True):
                number += 1
                row = dict(zip(columns, values, strict=True))
                yield from _row(f"{name}:row {number}", row, content)
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # of the file itself: Arrow's have no number
        reason = str(error).partition("\n")[0]
        raise BrokenFile(f"broken Parquet ({reason}): copy the file again") from error


def _row(name: str, columns: dict[str, Any], content: Content) -> Iterator[Document | Problem]:
    """The document of a row, whose values by column are Arrow's."""
    try:
        row = {column: value.as_py() for column, value in columns.items()}
        yield from documents(name, content.of_row(row))
    except UnicodeDecodeError as error:
        yield Problem(name, f"not UTF-8 text (byte {error.start}): fix or remove the row")
    except ValueError as error:
        yield Problem(name, str(error))
