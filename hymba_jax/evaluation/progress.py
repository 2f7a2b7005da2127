"""A bar on standard error with the time that is left, on a terminal."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import Progress, TextColumn, TimeRemainingColumn

from hymba_jax.parallel.processes import is_main_process


@contextmanager
def progress_bar(
    what: str, unit: str, *, disable: bool = False
) -> Iterator[Callable[[int, int], None]]:
    """The function (done, total) that moves the bar.

    Args:
      unit: of these numbers.
      disable: shows nothing, even on a terminal; nor do processes but the first.
    """
    columns = (
        *Progress.get_default_columns()[:2],
        TextColumn("{task.completed:,.0f} of {task.total:,.0f} " + unit),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    disable = disable or not console.is_terminal or not is_main_process()
    with Progress(*columns, console=console, transient=True, disable=disable) as progress:
        task = progress.add_task(what, total=0)
        yield lambda done, total: progress.update(task, completed=done, total=total)
