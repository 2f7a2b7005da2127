"""Output of commands: a live line on a terminal, else plain lines; sizes and times as text."""

from datetime import timedelta
from types import TracebackType

from rich.console import Console
from rich.text import Text


class Display:
    """Lines on the standard output, as a context.

    Args:
      plain: no live line, even on a terminal.
      quiet: shows nothing.
    """

    def __init__(self, *, plain: bool = False, quiet: bool = False) -> None:
        # A notebook says it is a terminal; it gets plain lines, which stay when it is saved.
        live = False if plain or Console().is_jupyter else None
        # Rich would make an emoji of the Python slice s[:x:2].
        self._console = Console(
            highlight=False, emoji=False, force_jupyter=False, force_terminal=live, quiet=quiet
        )
        self._status = self._console.status("")

    def say(self, text: str | Text) -> None:
        """Prints a line permanently."""
        self._console.print(text, markup=False, soft_wrap=True)

    def begin(self, what: str) -> None:
        """Announces a step that takes a while."""
        self.update(what)
        self.log(f"{what}…")

    def update(self, line: str) -> None:
        """Changes the live line, whose end is cut off if it is too long; elsewhere a no-op."""
        self._status.update(Text(line, no_wrap=True, overflow="ellipsis"))

    def log(self, line: str) -> None:
        """Prints a line permanently if there is no live line to show it."""
        if not self._console.is_terminal:
            self.say(line)

    def __enter__(self) -> "Display":
        self._status.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._status.stop()


def duration(seconds: float) -> str:
    """Hours, minutes and seconds, such as 1:02:03."""
    return str(timedelta(seconds=round(seconds)))


def format_bytes(size: float) -> str:
    """Bytes as text, such as 3.05 GB, or 12.3 MB if less than 1 GB."""
    return f"{size / 1e9:,.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
