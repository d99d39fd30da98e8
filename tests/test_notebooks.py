"""Every notebook runs from top to bottom, and is committed with the outputs of a run."""

from pathlib import Path

import nbformat
import pytest

from notebooks import ROOT, executed

NOTEBOOKS = sorted((ROOT / "nbs").glob("*.ipynb"))


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_the_notebook_runs(path: Path):
    notebook = executed(path)
    assert all(c.execution_count for c in notebook.cells if c.cell_type == "code")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_the_notebook_is_committed_with_outputs_and_short_cells(path: Path):
    cells = [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]
    assert any(c.outputs for c in cells) and all(c.execution_count for c in cells)
    assert max(len(c.source.splitlines()) for c in cells) <= 10
