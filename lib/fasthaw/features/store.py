"""Where rows live: tensors in memory, or a folder of `.npy` files on disk, named by a key.

A folder is written under another name and renamed when its manifest, with the size and the digest of every file, is on disk.
What a killed or failed run leaves behind is therefore never looked at, and is removed by the next one.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import socket
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

_MANIFEST = "manifest.json"
_CHUNK = 1 << 22


@dataclass(frozen=True)
class Column:
    """One tensor a row: its shape and dtype, and whether each item has its own or all share one."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    per_item: bool = True

    @property
    def bytes(self) -> int:
        """The bytes of one row."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


@dataclass(frozen=True, eq=False)
class FileRows:
    """Rows that are read from a `.npy` file as they are asked for.

    Mapping the file would be shorter, but the kernel maps up to megabytes around a row and counts them as ours.
    """

    path: Path
    offset: int
    column: Column

    def take(self, items: Tensor) -> Tensor:
        """The rows of these items, in their order."""
        rows = torch.empty((len(items), self.column.bytes), dtype=torch.uint8)
        with open(self.path, "rb", buffering=0) as f:
            for row, i in zip(rows.numpy(), items.tolist(), strict=True):
                f.seek(self.offset + i * self.column.bytes)
                if f.readinto(row) != len(row):
                    raise OSError(f"{self.path} ends before row {i}")
        return rows.view(self.column.dtype).reshape(len(items), *self.column.shape)


@dataclass(frozen=True, eq=False)
class Table:
    """Rows of several columns, each in memory or in a file."""

    columns: tuple[Column, ...]
    rows: tuple[Tensor | FileRows, ...]

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
    return Table(tuple(columns), rows)


class Folder:
    """The tables of one key in a directory of the user's."""

    def __init__(self, directory: Path, key: str) -> None:
        self.directory, self.path = Path(directory), Path(directory) / key

    def tables(self, memory: int) -> dict[str, Table] | None:
        """The finished tables, read into memory when they fit into `memory` bytes; `None` for none.

        Raises:
            ValueError: a file is not what was written.
        """
        if not (self.path / _MANIFEST).is_file():
            return None
        about = json.loads((self.path / _MANIFEST).read_text())
        for name, f in about["files"].items():
            if not (self.path / name).is_file() or _digest(self.path / name) != f["blake2b"]:
                raise ValueError(f"{self.path / name} is not what was written there")
        whole = sum(f["bytes"] for f in about["files"].values()) <= memory
        return {name: self._table(name, columns, whole) for name, columns in about["tables"].items()}

    def _table(self, name: str, about: list, whole: bool) -> Table:
        columns = tuple(Column(tuple(c["shape"]), getattr(torch, c["dtype"]), c["per_item"]) for c in about)
        paths = [self.path / f"{name}-{j}.npy" for j in range(len(columns))]
        if whole:
            arrays = [np.load(p, allow_pickle=False) for p in paths]
            rows = tuple(torch.from_numpy(a).view(c.dtype) for a, c in zip(arrays, columns, strict=True))
        else:
            rows = tuple(FileRows(p, _offset(p), c) for p, c in zip(paths, columns, strict=True))
        return Table(columns, rows)

    @contextmanager
    def writing(self, needed: int) -> Iterator[Writer]:
        """A writer whose tables become the folder when the block ends, and leave nothing when it does not.

        Raises:
            OSError: the disk is full.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        self._remove_leftovers()
        free = shutil.disk_usage(self.directory).free
        if free < needed:
            raise OSError(
                f"the cache needs {gigabytes(needed)} in {self.directory}, where {gigabytes(free)} are free; {_LESS}"
            )
        partial = (
            self.directory / f"{self.path.name}.{socket.gethostname()}.{os.getpid()}.{uuid.uuid4().hex[:8]}.partial"
        )
        partial.mkdir()
        try:
            writer = Writer(partial)
            yield writer
            writer.finish()
            if self.path.exists():
                shutil.rmtree(self.path)
            partial.rename(self.path)
            _sync_directory(self.directory)
        except OSError as e:
            if e.errno == errno.ENOSPC:
                raise OSError(
                    f"the disk of {self.directory} is full: the cache needs {gigabytes(needed)}; {_LESS}"
                ) from e
            raise
        finally:
            if partial.exists():
                shutil.rmtree(partial)

    def _remove_leftovers(self) -> None:
        """What runs of this key that ended on this machine did not finish."""
        for path in self.directory.glob(f"{self.path.name}.{socket.gethostname()}.*.partial"):
            pid = int(path.name.split(".")[-3])
            if os.name == "posix" and pid != os.getpid() and not _runs(pid):
                shutil.rmtree(path, ignore_errors=True)


class Writer:
    """Writes tables as `.npy` files, one a column, row after row."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._about: dict[str, dict] = {"files": {}, "tables": {}}

    def table(self, name: str, columns: Sequence[Column], n: int, batches: Iterable[Sequence[Tensor]]) -> None:
        """Write the rows that `batches` holds, as many as `n`."""
        files = [_NpyFile(self._path / f"{name}-{j}.npy", c, n) for j, c in enumerate(columns)]
        try:
            for batch in batches:
                for file, t in zip(files, batch, strict=True):
                    file.write(t)
        finally:
            for file in files:
                file.close()
        self._about["files"] |= {f.path.name: {"bytes": f.path.stat().st_size, "blake2b": f.digest()} for f in files}
        self._about["tables"][name] = [
            {"shape": c.shape, "dtype": str(c.dtype).removeprefix("torch."), "per_item": c.per_item} for c in columns
        ]

    def finish(self) -> None:
        """Write the manifest, which is what makes the files count."""
        with open(self._path / _MANIFEST, "w") as f:
            json.dump(self._about, f, indent=1)
            f.flush()
            os.fsync(f.fileno())
        _sync_directory(self._path)


class _NpyFile:
    def __init__(self, path: Path, column: Column, n: int) -> None:
        self.path, self._left = path, n if column.per_item else 1
        self._file, self._hash = open(path, "wb"), _hash()  # noqa: SIM115 (closed by the writer)
        # NumPy has no bfloat16: its bits are kept as integers, and the manifest says what they are.
        self._bits = torch.int16 if column.dtype == torch.bfloat16 else column.dtype
        descr = torch.empty(0, dtype=self._bits).numpy().dtype.str
        header = {"descr": descr, "fortran_order": False, "shape": (self._left, *column.shape)}
        np.lib.format.write_array_header_1_0(_Tee(self._file, self._hash), header)

    def write(self, t: Tensor) -> None:
        t = t[: self._left].contiguous().view(self._bits).cpu()
        self._left -= len(t)
        _Tee(self._file, self._hash).write(memoryview(t.numpy()).cast("B"))

    def close(self) -> None:
        with self._file:
            self._file.flush()
            os.fsync(self._file.fileno())

    def digest(self) -> str:
        return self._hash.hexdigest()


class _Tee:
    def __init__(self, file, digest) -> None:
        self._file, self._digest = file, digest

    def write(self, data) -> None:
        self._file.write(data)
        self._digest.update(data)


_LESS = "name a directory with more room, or halve it with dtype=torch.float16"


def gigabytes(n: int) -> str:
    """Bytes as text.

    >>> gigabytes(12_345_678)
    '12.3 MB'
    """
    return f"{n / 1e9:.1f} GB" if n >= 1e9 else f"{n / 1e6:.1f} MB"


def _offset(path: Path) -> int:
    """Where the rows of a `.npy` file begin."""
    with open(path, "rb") as f:
        np.lib.format.read_magic(f)
        np.lib.format.read_array_header_1_0(f)
        return f.tell()


def _hash():
    return hashlib.blake2b(digest_size=16)


def _digest(path: Path) -> str:
    digest = _hash()
    with open(path, "rb") as f:
        while chunk := f.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _sync_directory(path: Path) -> None:
    if os.name == "posix":
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
