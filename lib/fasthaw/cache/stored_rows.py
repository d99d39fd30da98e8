"""Tables: rows of several columns, each a tensor in memory or a file that is read as rows are asked for."""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from . import directory as places
from .manifest import Column


@dataclass(frozen=True, eq=False)
class FileRows:
    """Rows that are read from a `.npy` file as they are asked for.

    Mapping the file would be shorter, but the kernel maps up to megabytes around a row and counts them as ours.
    """

    file: OpenFile
    offset: int
    column: Column

    def take(self, items: Tensor) -> Tensor:
        """The rows of these items, in their order."""
        rows = torch.empty((len(items), self.column.bytes), dtype=torch.uint8)
        for row, i in zip(rows.numpy(), items.tolist(), strict=True):
            self.file.read_into(row, self.offset + i * self.column.bytes)
        return rows.view(self.column.dtype).reshape(len(items), *self.column.shape)


class OpenFile:
    """A file of a finished cache, which nobody removes while this lives; a copy of it opens the file anew."""

    def __init__(self, path: Path) -> None:
        self.path, self._lock = path, places.wait_for(path.parent / places.MARKER, shared=True)
        self._fd = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        weakref.finalize(self, os.close, self._fd)

    def __reduce__(self) -> tuple:
        return OpenFile, (self.path,)

    def read_into(self, row: np.ndarray, offset: int) -> None:
        """Fill `row` with the bytes from `offset` on."""
        at = 0
        while at < len(row):
            read = self._read(row[at:], offset + at)
            if not read:
                raise OSError(f"{self.path} ends before byte {offset + len(row)}; it was cut while it was in use")
            at += read

    def _read(self, row: np.ndarray, offset: int) -> int:
        if hasattr(
            os, "preadv"
        ):  # straight into place: a copy on the way would scatter the memory that rows are made in
            return os.preadv(self._fd, [row.data], offset)
        with open(self.path, "rb", buffering=0) as f:  # Windows
            f.seek(offset)
            return f.readinto(row.data)


@dataclass(frozen=True, eq=False)
class Table:
    """Rows of several columns, each in memory or in a file."""

    columns: tuple[Column, ...]
    rows: tuple[Tensor | FileRows, ...]
    n: int

    @property
    def on_disk(self) -> bool:
        """Whether rows are read from files."""
        return any(isinstance(r, FileRows) for r in self.rows)

    def take(self, items: Tensor) -> list[Tensor]:
        """The rows of these items, copied, in their order; of a column that all items share its one row."""
        one = torch.zeros(1, dtype=torch.int64)
        asked = [items if c.per_item else one for c in self.columns]
        return [
            r.take(i) if isinstance(r, FileRows) else r.index_select(0, i)
            for i, r in zip(asked, self.rows, strict=True)
        ]


def size(columns: Iterable[Column], n: int) -> int:
    """The bytes of a table of `n` rows."""
    return sum(c.bytes * (n if c.per_item else 1) for c in columns)


def in_memory(columns: Sequence[Column], n: int, batches: Iterable[Sequence[Tensor]]) -> Table:
    """A table of the rows that `batches` holds, as many as `n`."""
    rows = tuple(torch.empty((n if c.per_item else 1, *c.shape), dtype=c.dtype) for c in columns)
    at = 0
    for batch in batches:
        some = 0
        for column, row, t in zip(columns, rows, batch, strict=True):
            if column.per_item:
                some = min(len(t), n - at)
                row[at : at + some] = t[:some]
            elif at == 0:
                row.copy_(t)
        at += some
    return Table(tuple(columns), rows, n)


def gigabytes(n: int) -> str:
    """Bytes as text.

    >>> gigabytes(12_345_678)
    '12.3 MB'
    """
    return f"{n / 1e9:.1f} GB" if n >= 1e9 else f"{n / 1e6:.1f} MB"
