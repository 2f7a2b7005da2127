"""Images that commands write: matplotlib, the extra `plots`, without its global state."""

from pathlib import Path
from typing import TYPE_CHECKING

from hymba_jax.errors import HymbaError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def make_figure(path: Path, width: float, height: float) -> "Figure":
    """An empty figure, of so many inches, for a file.

    Raises:
      HymbaError: matplotlib is not installed, or does not know the file's suffix.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise HymbaError(
            'an image takes matplotlib, which is not installed: pip install "hymba_jax[plots]"'
        ) from error
    figure = Figure(figsize=(width, height), layout="constrained")
    if path.suffix[1:].lower() not in figure.canvas.get_supported_filetypes():
        raise HymbaError(f"{path}: an image ends in .png, .pdf or .svg")
    return figure


def save_figure(figure: "Figure", path: Path) -> None:
    """Writes the image atomically."""
    beside = path.with_name(f".{path.name}.partial{path.suffix}")
    figure.savefig(beside, dpi=150)
    beside.replace(path)
