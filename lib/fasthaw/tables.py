"""Tables as text for a terminal and as HTML for a notebook, of the same cells."""

from __future__ import annotations

import io
import shutil
from collections.abc import Collection, Sequence

import pandas as pd
from rich import box
from rich.console import Console
from rich.table import Table


def as_text(columns: Sequence[str], rows: Sequence[Sequence[str]], right: Collection[str] = ()) -> str:
    """The cells as a table no wider than the terminal (120 where there is none); columns named in `right` end flush."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in columns:
        table.add_column(name, justify="right" if name in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    out = io.StringIO()
    # Plain text, in a notebook too: rich would show it there by itself, and colour what is committed.
    Console(file=out, force_jupyter=False, color_system=None, width=shutil.get_terminal_size((120, 24)).columns).print(
        table
    )
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()).lstrip("\n")


def as_html(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The cells as an HTML table without an index."""
    return pd.DataFrame([tuple(r) for r in rows], columns=list(columns)).to_html(index=False, border=0)
