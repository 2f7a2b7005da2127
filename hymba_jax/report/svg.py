"""Figures as SVG inside the page: text stays text, in the page's own color."""

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from hymba_jax.errors import HymbaError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_INK = "#010203"  # stands for the color of the page's text, which follows its theme
_LINES = ("axes.edgecolor", "axes.labelcolor", "text.color", "xtick.color", "ytick.color")
_STYLE: Any = {  # matplotlib's own type lists every name
    **dict.fromkeys(_LINES, _INK),
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "font.family": "sans-serif",
    "font.size": 11,
    "svg.fonttype": "none",
}


@contextmanager
def page_style() -> Iterator[None]:
    """Figures that are made inside, and written by `to_svg`, have the page's style.

    Raises:
      HymbaError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise HymbaError(
            'a report takes matplotlib, which is not installed: pip install "hymba_jax[plots]"'
        ) from error
    with matplotlib.rc_context(_STYLE):
        yield


def new_figure(width: float, height: float) -> "Figure":
    """An empty figure of so many inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def to_svg(figure: "Figure", prefix: str) -> str:
    """The figure as an `<svg>` element, as wide as its place.

    Args:
      prefix: of the ids in it, which are unique in the page.
    """
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", dpi=150)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]  # without the XML declaration
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="{prefix}-', svg)
    svg = re.sub(r'(url\(#|href="#)', rf"\g<1>{prefix}-", svg)
    svg = re.sub(r' width="[\d.]+pt"| height="[\d.]+pt"', "", svg, count=2)
    return svg.replace(_INK, "currentColor")
