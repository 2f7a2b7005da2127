"""The notebooks run from top to bottom."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"


PATHS = sorted(NOTEBOOKS.glob("*.ipynb"))


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_it_opens_elsewhere(path):
    """The first cell of code installs the package, the next one imports public names alone."""
    cells = nbformat.read(path, as_version=4).cells
    code = [cell.source for cell in cells if cell.cell_type == "code"]
    assert "%pip install" in code[0]
    private = re.compile(r"(import|from) .*\b_\w|hymba_jax\.\w*\._|\b\w+\._[a-z]")
    assert not [line for source in code for line in source.splitlines() if private.search(line)]
    shown = [output for cell in cells for output in cell.get("outputs", ())]
    assert "error" not in {output.output_type for output in shown}


@pytest.mark.slow
@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_notebook(path, monkeypatch):
    monkeypatch.delenv("XLA_FLAGS")  # one device, as a reader has
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=900, kernel_name="python3").execute()
    pictures = [
        output
        for cell in notebook.cells
        for output in cell.get("outputs", ())
        if "image/png" in output.get("data", {})
    ]
    assert len(pictures) >= 2  # of each at least
