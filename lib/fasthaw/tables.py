"""Tables as text for a terminal and as HTML for a notebook, of the same cells.

Every table of the library is printed here. rich is imported when one is: what only computes does not need it.
"""

from __future__ import annotations

import io
import shutil
from collections.abc import Collection, Sequence
from html import escape
from typing import Literal


def as_text(
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    right: Collection[str] = (),
    *,
    rule: Literal["line", "dashes", "none"] = "line",
) -> str:
    """The cells as a table no wider than the terminal (120 where there is none); columns named in `right` end flush.

    Below the header is a line from end to end, or dashes as long as each column, or nothing.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(
        box=box.SIMPLE_HEAD if rule == "line" else None,
        pad_edge=False,
        padding=(0, 1) if rule == "line" else (0, 2, 0, 0),
    )
    for name in columns:
        table.add_column(name, justify="right" if name in right else "left", overflow="fold")
    if rule == "dashes":
        table.add_row(*("-" * max(map(len, column)) for column in zip(columns, *rows, strict=True)))
    for row in rows:
        table.add_row(*row)
    out = io.StringIO()
    # Plain text, in a notebook too: rich would show it there by itself, and colour what is committed.
    Console(file=out, force_jupyter=False, color_system=None, width=shutil.get_terminal_size((120, 24)).columns).print(
        table, markup=False
    )
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()).lstrip("\n")


def as_html(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The cells as an HTML table that notebooks style as they do a data frame; no cell is cut short."""
    head = "\n".join(f"      <th>{escape(c, quote=False)}</th>" for c in columns)
    body = "\n".join(
        "    <tr>\n" + "\n".join(f"      <td>{escape(c, quote=False)}</td>" for c in row) + "\n    </tr>"
        for row in rows
    )
    return (
        f'<table class="dataframe">\n  <thead>\n    <tr style="text-align: right;">\n{head}\n    </tr>\n  </thead>\n'
        f"  <tbody>\n{body}\n  </tbody>\n</table>"
    )
