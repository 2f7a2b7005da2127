"""The documents of files as a stream, and what is done about bad records."""

from collections.abc import Callable, Iterable, Iterator

from hymba_jax.config.data import OnBadRecord
from hymba_jax.data.formats import read_records
from hymba_jax.data.listing import File
from hymba_jax.data.records import BrokenFile, Content, Document, Problem, WrongColumns
from hymba_jax.data.text_field import TextField
from hymba_jax.errors import HymbaError, printable

# Problems of a file that an error lists.
_LISTED = 20

_TEXT = TextField()


class BadRecordsError(HymbaError):
    """A file's bad records: one line about the file, then one for each record."""

    def __str__(self) -> str:
        return "\n".join(map(printable, self.args))


def read_documents(
    files: Iterable[File],
    content: Content = _TEXT,
    on_bad_record: OnBadRecord = "stop",
    report: Callable[[Problem], None] | None = None,
) -> Iterator[Document]:
    """The documents of the files in order, in bounded memory; long ones in pieces.

    Args:
      files: such as those of a `Listing`.
      content: what of each record is the document.
      on_bad_record: "skip" goes on after bad records, and with the next file after a file that
        cannot be read on; "stop" first looks for more of them in the same file. Empty records are
        skipped.
      report: called with each problem that is skipped.

    Raises:
      BadRecordsError: there are bad records, and they are not to be skipped.
      HymbaError: a file cannot be opened or read, whatever `on_bad_record`.
    """
    for file in files:
        problems: list[Problem] = []
        count = 0
        for item in _read(file, content):
            if isinstance(item, Document):
                if not count:
                    yield item
            elif item.is_bad and on_bad_record == "stop":
                count += 1
                if count <= _LISTED:
                    problems.append(item)
            elif report is not None:
                report(item)
        if count:
            raise _bad_records(file, problems, count)


def _read(file: File, content: Content) -> Iterator[Document | Problem]:
    try:
        with file.open() as stream:
            yield from read_records(stream, file.name, content)
    except BrokenFile as error:
        is_rare = not isinstance(error, WrongColumns)
        yield Problem(file.name, str(error), whole_file=True, is_rare=is_rare)
    except OSError as error:
        raise HymbaError(
            f"{file.path}: cannot be read ({error.strerror or error}): check the file"
        ) from error


def _bad_records(file: File, problems: list[Problem], count: int) -> BadRecordsError:
    advice = 'or set data.on_bad_record to "skip" (--data.on-bad-record skip)'
    lines = [f"{file.path}{_place(file, problem)}: {problem.reason}" for problem in problems]
    if count == 1:
        return BadRecordsError(f"{lines[0]}, {advice}" if problems[0].is_rare else lines[0])
    more = [f"and {count - len(lines)} more"] if count > len(lines) else []
    return BadRecordsError(
        f"{file.path}: {count} problems: fix them, {advice}",
        *(f"  {line}" for line in (*lines, *more)),
    )


def _place(file: File, problem: Problem) -> str:
    """Where in the file: what the problem's name has after the file's."""
    return problem.name.removeprefix(file.name)
