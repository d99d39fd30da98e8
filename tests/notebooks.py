"""Runs notebooks; `make notebooks` calls it with paths, and they are written back with their new outputs."""

import os
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent


def executed(path: Path, then: str = "") -> nbformat.NotebookNode:
    """The notebook at `path` with the outputs of running every cell in `nbs/`; raises where a cell does.

    `then` is run after its last cell and left out again: what a test claims about the values that the reader sees. Timings
    are left out of the metadata, so that running twice changes nothing but the outputs; so are other packages' warnings,
    which carry the paths of one machine, and fastprogress's style sheet, white on a dark page: a table is the page's to style.
    """
    os.environ["PYTHONWARNINGS"] = "ignore"
    notebook = nbformat.read(path, as_version=4)
    notebook.cells.append(nbformat.v4.new_code_cell(then))
    where = {"metadata": {"path": str(ROOT / "nbs")}}
    NotebookClient(notebook, timeout=600, kernel_name="python3", record_timing=False, resources=where).execute()
    notebook.cells.pop()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = list(filter(_belongs_here, cell.outputs))
    return notebook


def _belongs_here(output: nbformat.NotebookNode) -> bool:
    """Without the wish for a ground under a figure, which Jupyter has of its own."""
    output.get("metadata", {}).pop("needs_background", None)
    return "table.fastprogress {" not in output.get("data", {}).get("text/html", "")


if __name__ == "__main__":
    for path in sys.argv[1:]:
        print(path)
        nbformat.write(executed(Path(path)), path)
