"""Runs notebooks; `make notebooks` calls it with paths, and they are written back with their new outputs."""

import os
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent


def executed(path: Path) -> nbformat.NotebookNode:
    """The notebook at `path` with the outputs of running every cell in `nbs/`; raises where a cell does.

    Timings are left out of the metadata, so that running twice changes nothing but the outputs; so are other packages'
    warnings, which carry the paths of one machine.
    """
    os.environ["PYTHONWARNINGS"] = "ignore"
    notebook = nbformat.read(path, as_version=4)
    where = {"metadata": {"path": str(ROOT / "nbs")}}
    return NotebookClient(notebook, timeout=600, kernel_name="python3", record_timing=False, resources=where).execute()


if __name__ == "__main__":
    for path in sys.argv[1:]:
        print(path)
        nbformat.write(executed(Path(path)), path)
