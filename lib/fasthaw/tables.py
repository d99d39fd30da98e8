"""Tables as text for a terminal and as HTML for a notebook, of the same cells.

Every table and caption of the library is printed here, and here alone the width of the screen is asked. A number or a word
never breaks: sentences wrap, then names lose their middle, then the columns go below each other.
"""

from __future__ import annotations

import io
import re
import shutil
import textwrap
from collections.abc import Collection, Iterator, Sequence
from html import escape
from itertools import groupby
from typing import Literal

Rule = Literal["line", "dashes", "none"]
_NO_SCREEN = 100  # columns, where there is no terminal: what a notebook shows without scrolling, too
_NAME, _SENTENCE = 12, 18  # columns that a name, and a text of several words, keep where there is little room
_LONG_NAME = 40  # characters of a name in HTML; all of it is told where the pointer rests
_GAP = 2  # between columns
_ALIKE = 3  # rows that are folded into one
_NUMBER = re.compile(r"[<>+-]?\d[\d,]*(\.\d+)?(e[+-]?\d+)?%?(-\d+)?|-|")


def screen_width() -> int:
    """The columns of the terminal; `COLUMNS` in the environment says another number."""
    return shutil.get_terminal_size((_NO_SCREEN, 24)).columns


def wrapped(text: str) -> str:
    """A caption in lines no wider than the screen, broken between words."""
    return textwrap.fill(text, screen_width(), break_long_words=False, break_on_hyphens=False)


def shortened(name: str, width: int) -> str:
    """`name` in at most `width` columns of a screen; what is left out is in the middle.

    >>> shortened("encoder.layers.11.mlp", 12)
    'encode…1.mlp'
    """
    from rich.cells import cell_len

    kept = min(width, len(name)) - 1  # characters; a Chinese one is two columns wide
    short = name
    while cell_len(short) > width and kept >= 0:
        end = kept // 2
        short, kept = f"{name[: kept - end]}…{name[len(name) - end :]}", kept - 1
    return short


def as_text(
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    right: Collection[str] | None = None,
    *,
    names: int = 0,
    rule: Rule = "line",
) -> str:
    """The cells as a table no wider than the screen; columns named in `right` end flush, else those of numbers.

    `names` is how many columns say whose row it is: rows alike in all others are folded. Below the header is a line from
    end to end, or dashes as long as each column, or nothing. Where not all columns fit they follow in blocks, each with the
    first column.
    """
    rows = folded(rows, names)
    flush = _flush(columns, rows, right)
    blocks = [
        _drawn([columns[i] for i in at], [[row[i] for i in at] for row in rows], [flush[i] for i in at], widths, rule)
        for at, widths in _blocks(columns, rows, flush)
    ]
    return "\n\n".join(blocks)


def as_html(
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    right: Collection[str] | None = None,
    *,
    names: int = 0,
    below: Sequence[str] = (),
) -> str:
    """The cells as an HTML table, and a paragraph for each text `below`; wider than the page, it scrolls by itself.

    Notebooks style it as they do a data frame, dark or light. How text is aligned is written at every cell, as notebooks
    align all to the right and drop style sheets of what they do not trust.
    """
    rows = folded(rows, names)
    flush = _flush(columns, rows, right)
    head = "\n".join(f"      {_cell('th', c, f)}" for c, f in zip(columns, flush, strict=True))
    body = "\n".join(
        "    <tr>\n" + "\n".join(f"      {_cell('td', c, f)}" for c, f in zip(row, flush, strict=True)) + "\n    </tr>"
        for row in rows
    )
    said = "".join(f"<p>{escape(text, quote=False)}</p>" for text in below if text)
    return (
        f'<div style="overflow-x: auto"><table class="dataframe">\n  <thead>\n    <tr>\n{head}\n    </tr>\n  </thead>\n'
        f"  <tbody>\n{body}\n  </tbody>\n</table></div>{said}"
    )


def as_markdown(columns: Sequence[str], rows: Sequence[Sequence[str]], right: Collection[str] | None = None) -> str:
    """The cells as a table in GitHub's Markdown, for a model card or an issue.

    >>> print(as_markdown(["stage", "epochs"], [["1 head", "3"]]))
    | stage | epochs |
    | :-- | --: |
    | 1 head | 3 |
    """
    flush = _flush(columns, rows, right)
    lines = [columns, ["--:" if f else ":--" for f in flush], *rows]
    cells = [[" ".join(str(cell).replace("|", "\\|").split()) for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def folded(rows: Sequence[Sequence[str]], names: int) -> list[list[str]]:
    """Runs of rows that differ in the first `names` columns alone as one row each, which says how many.

    >>> folded([["a", "1"], ["b", "1"], ["c", "1"], ["d", "2"]], 1)
    [['a .. c (3\\xa0alike)', '1'], ['d', '2']]
    """
    if not names:
        return [list(row) for row in rows]
    found = []
    for _, run in groupby(rows, lambda row: tuple(row[names:])):
        alike = list(run)
        if len(alike) < _ALIKE:
            found += [list(row) for row in alike]
            continue
        first, last = alike[0], alike[-1]
        ends = [a if a == b else f"{a} .. {b}" for a, b in zip(first[:names], last[:names], strict=True)]
        found.append([f"{ends[0]} ({len(alike)}\u00a0alike)", *ends[1:], *first[names:]])
    return found


def _flush(columns: Sequence[str], rows: Sequence[Sequence[str]], right: Collection[str] | None) -> list[bool]:
    """Whether each column ends flush: it is named, or nothing but numbers is in it."""
    if right is not None:
        return [name in right for name in columns]
    numbers = [all(_NUMBER.fullmatch(row[i]) for row in rows) for i in range(len(columns))]
    return [n and any(row[i].strip("-") for row in rows) for i, n in enumerate(numbers)]


def _blocks(
    columns: Sequence[str], rows: Sequence[Sequence[str]], flush: Sequence[bool]
) -> Iterator[tuple[list[int], list[int]]]:
    """The columns that go beside each other, and their widths; the first is in every block."""
    from rich.cells import cell_len

    cells = [[name, *(row[i] for row in rows)] for i, name in enumerate(columns)]
    whole = [max(map(cell_len, c)) for c in cells]
    words = [max(cell_len(w) for cell in c for w in cell.split() or [""]) for c in cells]
    body = [max(map(cell_len, c[1:]), default=0) for c in cells]
    # How far a column may give way: first between words, then within names. A number is whole, its header may wrap.
    wrap = [max(w, b) if f else max(w, min(n, _SENTENCE)) for w, b, n, f in zip(words, body, whole, flush, strict=True)]
    heads = [max(map(cell_len, name.split() or [""])) for name in columns]
    texts = [any(" " in row[i] for row in rows) for i in range(len(columns))]
    least = [
        w if f else max(min(w, _SENTENCE if t else _NAME), h)
        for w, h, f, t in zip(wrap, heads, flush, texts, strict=True)
    ]
    left = list(range(len(columns)))
    while left:
        at = left[:2]
        for i in left[2:]:
            if sum(least[j] for j in [*at, i]) > _room(len(at) + 1):
                break
            at.append(i)
        widths = [whole[i] for i in at]
        for floor in (wrap, least):
            widths = _given_way(widths, [floor[i] for i in at], _room(len(at)))
        yield at, widths
        left = left[:1] + left[len(at) :] if len(at) < len(left) else []


def _room(n: int) -> int:
    return screen_width() - _GAP * (n - 1)


def _given_way(widths: list[int], floor: Sequence[int], room: int) -> list[int]:
    """The widths, of which the widest has given way step by step until all fit or none can."""
    widths = list(widths)
    while sum(widths) > room:
        able = [i for i, w in enumerate(widths) if w > floor[i]]
        if not able:
            break
        widths[max(able, key=lambda i: widths[i])] -= 1
    return widths


def _drawn(
    columns: Sequence[str], rows: Sequence[Sequence[str]], flush: Sequence[bool], widths: Sequence[int], rule: Rule
) -> str:
    # rich is imported when a table is printed: what only computes does not need it.
    from rich import box
    from rich.console import Console
    from rich.table import Table

    lined = rule == "line"
    # The box has a column of its own between two columns.
    padding = (0, _GAP - 1 if lined else _GAP, 0, 0)
    table = Table(box=box.SIMPLE_HEAD if lined else None, show_edge=False, pad_edge=False, padding=padding)
    for name, width, f in zip(columns, widths, flush, strict=True):
        table.add_column(name, justify="right" if f else "left", overflow="fold", width=width)
    if rule == "dashes":
        table.add_row(*("-" * width for width in widths))
    for row in rows:
        table.add_row(
            *(
                " ".join(shortened(w, n) for w in re.split("[ \\n\\t]+", cell))
                for cell, n in zip(row, widths, strict=True)
            )
        )
    out = io.StringIO()
    # Plain text, in a notebook too: rich would show it there by itself, and colour what is committed.
    room = max(screen_width(), sum(widths) + _GAP * len(widths))
    Console(file=out, force_jupyter=False, color_system=None, width=room).print(table, markup=False)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()).strip("\n")


def _cell(tag: str, text: str, flush: bool) -> str:
    short = " ".join(shortened(word, _LONG_NAME) for word in text.split(" "))
    title = "" if short == text else f' title="{escape(text)}"'
    room = (
        "white-space: nowrap" if flush or len(short) <= _SENTENCE or " " not in short else f"min-width: {_SENTENCE}ch"
    )
    style = f"text-align: {'right' if flush else 'left'}{f'; {room}' if tag == 'td' else ''}"
    return f'<{tag} style="{style}"{title}>{escape(short, quote=False)}</{tag}>'
