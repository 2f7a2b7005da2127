"""What a page consists of, and its HTML."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import jinja2
from markupsafe import Markup

from hymba_jax.report.svg import to_svg

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TEMPLATE = Path(__file__).with_name("page.html")


@dataclass(frozen=True)
class Picture:
    """A figure of the page.

    Attributes:
      title: what it shows, in a few words.
      caption: how to read it, and what the paper shows.
      drawing: made inside `page_style`.
    """

    title: str
    caption: str
    drawing: "Figure"


@dataclass(frozen=True)
class Table:
    """A table of the page, whose first column has names and the others numbers."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""


@dataclass(frozen=True)
class Section:
    """A part of the page under one heading.

    Attributes:
      intro: a sentence or two below the heading.
      source: text that is shown as it is, behind a summary.
    """

    title: str
    intro: str = ""
    pictures: Sequence[Picture] = ()
    tables: Sequence[Table] = ()
    source: str = ""


@dataclass(frozen=True)
class Page:
    """The page.

    Attributes:
      subtitle: of the heading.
      facts: numbers that are shown first, each with what it is.
      footer: who made the page, from what.
    """

    title: str
    subtitle: str
    facts: Sequence[tuple[str, str]]
    sections: Sequence[Section]
    footer: str = ""

    def render(self) -> str:
        """The HTML, inside `page_style`. Everything is in it: no script, no link elsewhere."""
        numbers = iter(range(1, 1000))

        def svg(picture: Picture) -> Markup:
            return Markup(to_svg(picture.drawing, f"figure-{next(numbers)}"))

        environment = jinja2.Environment(
            autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
        )
        template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
        return template.render(page=self, svg=svg)
