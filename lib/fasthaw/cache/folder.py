"""A folder of `.npy` files on disk, named by a key.

It is written under another name and renamed when its manifest, with the size and the digest of every file, is on disk. What a
killed or failed run leaves behind is therefore never looked at, and is removed by a later one. Of several runs that want one
key at the same time one fills, and the others wait and read what it made.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import uuid
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from . import directory as places
from .manifest import DTYPES, Column, Damaged, Entry, File, decoded, encoded, file_name
from .stored_rows import FileRows, OpenFile, Table, gigabytes

_CHUNK = 1 << 22
_ELSEWHERE = "name a directory that can be written to, or leave it out to keep the cache in memory"
_LESS = "name a directory with more room, or halve it with dtype=torch.float16"


class Folder:
    """The tables of one key in a directory of the user's."""

    def __init__(self, directory: Path, key: str) -> None:
        self.directory, self.path = Path(directory), Path(directory) / key
        self._seen: tuple | None = None  # the manifest that `tables` looked at last

    def tables(self, memory: int) -> dict[str, Table] | None:
        """The finished tables, read into memory when they fit into `memory` bytes; `None` for none.

        Raises:
            Damaged: a file is not what was written.
            ValueError: what stands there is not ours.
            OSError: it may not be read.
        """
        with places.told(f"the cache {self.path} cannot be read", _ELSEWHERE):
            self._check()
            self._seen = self._stamp()
            if self._seen is None:
                return None
            # While it is read nobody removes it.
            held = places.wait_for(self.path / places.MARKER, shared=True)
            try:
                return self._tables(memory)
            except FileNotFoundError as e:
                raise Damaged(f"{e.filename} is not there any more") from e
            finally:
                held.release()

    def _tables(self, memory: int) -> dict[str, Table]:
        manifest = self.path / places.MANIFEST
        try:
            entries = decoded(manifest.read_bytes(), self.path.name)
        except Damaged as e:
            raise Damaged(f"{manifest} is damaged: {e}") from e
        for name, entry in entries.items():
            for j, file in enumerate(entry.files):
                _check_file(self.path / file_name(name, j), file)
        whole = sum(f.bytes for e in entries.values() for f in e.files) <= memory
        tables = {name: self._table(name, entry, whole) for name, entry in entries.items()}
        self._used()
        return tables

    def _table(self, name: str, entry: Entry, whole: bool) -> Table:
        rows: list[Tensor | FileRows] = []
        for j, c in enumerate(entry.columns):
            path = self.path / file_name(name, j)
            n = entry.n if c.per_item else 1
            file = FileRows(OpenFile(path), _offset(path, c, n), c)
            rows.append(file.take(torch.arange(n)) if whole else file)
        return Table(entry.columns, tuple(rows), entry.n)

    def _check(self) -> None:
        """Raise `ValueError` where something that is not ours stands in the place of the folder."""
        if os.path.lexists(self.path) and not places.proved(self.path):
            raise ValueError(
                f"{self.path} was not made by fasthaw, or not by this version, so it is left as it is; move it away, or name "
                "another directory"
            )

    def _stamp(self) -> tuple | None:
        try:
            stat = (self.path / places.MANIFEST).stat()
        except FileNotFoundError:
            return None
        return stat.st_ino, stat.st_size, stat.st_mtime_ns

    def _used(self) -> None:
        """Let the age of the folder count from now."""
        try:
            os.utime(self.path / places.MARKER)
        except PermissionError:
            pass  # another user's: only the order of age is lost
        except OSError as e:
            if e.errno != errno.EROFS:
                raise

    @contextmanager
    def writing(self, needed: int, keep: int | None = None) -> Iterator[Writer | None]:
        """A writer whose tables become the folder when the block ends, and leave nothing when it does not.

        `None` where another run has made the folder since it was looked for: look again. What `tables` found damaged is
        replaced. Of the finished folders in the directory only the `keep` that were used last are left.

        Raises:
            OSError: the disk is full, or may not be written to.
            ValueError: what stands in the place of the folder is not ours.
        """
        claimed = self._claimed(needed)
        if claimed is None:
            yield None
            return
        partial, held = claimed
        try:
            writer = Writer(partial, self.path.name, lambda: self._told(needed))
            yield writer
            writer.finish()
            with self._told(needed), places.alone(self.directory):
                self._publish(partial)
                held.release()
                if keep is not None:
                    self._remove_old(keep)
        finally:
            if places.proved(partial):
                places.remove(partial, held)
            held.release()

    def _claimed(self, needed: int) -> tuple[Path, places.Lock] | None:
        """A new folder to write to and its lock; `None` after waiting for another run that was writing this one."""
        self._check()
        with self._told(needed):
            self.directory.mkdir(parents=True, exist_ok=True)
            with places.alone(self.directory) as mutex:
                if self._stamp() != self._seen:
                    return None
                self._check_replaceable()
                if mutex.real:  # without locks nothing tells what is dead
                    for path in places.partials(self.directory):
                        places.remove(path)
                other = next((p for p in places.partials(self.directory) if p.name.startswith(self.path.name)), None)
                if other is None or not mutex.real:
                    return self._made(needed)
        warnings.warn(f"another run is filling {self.path}; this one waits for it", stacklevel=2)
        with suppress(FileNotFoundError):  # it has ended just now
            places.wait_for(other / places.MARKER, shared=True).release()
        return None

    def _check_replaceable(self) -> None:
        foreign = places.foreign(self.path) if places.proved(self.path) else []
        if foreign:
            raise ValueError(
                f"{self.path} is damaged or of other data, and holds what is not ours ({', '.join(foreign[:3])}), so it is "
                "not replaced; move that away, or name another directory"
            )

    def _made(self, needed: int) -> tuple[Path, places.Lock]:
        free = shutil.disk_usage(self.directory).free
        if free < needed:
            raise OSError(
                f"the cache needs {gigabytes(needed)} in {self.directory}, where {gigabytes(free)} are free; {_LESS}"
            )
        partial = self.directory / f"{self.path.name}.{uuid.uuid4().hex[:8]}.partial"
        partial.mkdir()
        return partial, places.mark(partial)

    def _publish(self, partial: Path) -> None:
        """Rename what was written; what stands there now is set aside and removed when nobody reads it any more."""
        if self._stamp() != self._seen and self._stamp() is not None:
            return  # without locks another run may have been faster: its folder stays
        self._check()
        aside = self.directory / f"{self.path.name}.{uuid.uuid4().hex[:8]}.partial"
        if self.path.exists():
            self.path.rename(aside)
        partial.rename(self.path)
        _sync_directory(self.directory)
        if aside.exists():
            places.remove(aside)

    def _remove_old(self, keep: int) -> None:
        for path in places.finished(self.directory)[keep:]:
            if path != self.path:
                places.remove(path)

    @contextmanager
    def _told(self, needed: int) -> Iterator[None]:
        try:
            yield
        except OSError as e:
            if e.errno in (errno.ENOSPC, errno.EDQUOT):
                raise OSError(
                    e.errno, f"the disk of {self.directory} is full: the cache needs {gigabytes(needed)}; {_LESS}"
                ) from e
            if e.errno is None:  # ours
                raise
            with places.told(f"the cache cannot be written in {self.directory}", _ELSEWHERE):
                raise


class Writer:
    """Writes tables as `.npy` files, one a column, row after row; `told` is entered around all that writes."""

    def __init__(self, path: Path, key: str, told) -> None:
        self._path, self._key, self._told = path, key, told
        self._entries: dict[str, Entry] = {}

    def table(self, name: str, columns: Sequence[Column], n: int, batches: Iterable[Sequence[Tensor]]) -> None:
        """Write the rows that `batches` holds, as many as `n`.

        Raises:
            ValueError: a file cannot hold rows of this dtype.
        """
        odd = [c.dtype for c in columns if c.dtype not in DTYPES.values()]
        if odd:
            raise ValueError(f"rows of {odd[0]} cannot be kept on disk; leave directory out to keep them in memory")
        with ExitStack() as closing:
            with self._told():
                files = [_NpyFile(self._path / file_name(name, j), c, n) for j, c in enumerate(columns)]
            for file in files:
                closing.callback(file.close)
            for batch in batches:
                with self._told():
                    for file, t in zip(files, batch, strict=True):
                        file.write(t)
            with self._told():
                for file in files:
                    file.flush()
        self._entries[name] = Entry(n, tuple(columns), tuple(f.about() for f in files))

    def finish(self) -> None:
        """Write the manifest, which is what makes the files count."""
        with self._told():
            with open(self._path / places.MANIFEST, "wb") as f:
                f.write(encoded(self._key, self._entries))
                f.flush()
                os.fsync(f.fileno())
            _sync_directory(self._path)


class _NpyFile:
    def __init__(self, path: Path, column: Column, n: int) -> None:
        self._path, self._left = path, n if column.per_item else 1
        self._file, self._hash = open(path, "xb"), _hash()  # noqa: SIM115 (closed by the writer)
        self._bits = _bits(column.dtype)
        header = {
            "descr": _descr(self._bits),
            "fortran_order": False,
            "shape": (self._left, *column.shape),
        }
        np.lib.format.write_array_header_1_0(_Tee(self._file, self._hash), header)

    def write(self, t: Tensor) -> None:
        t = t[: self._left].contiguous().view(self._bits).cpu()
        self._left -= len(t)
        _Tee(self._file, self._hash).write(t.numpy().data.cast("B"))

    def flush(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        try:
            self._file.close()
        except OSError as e:
            # A full disk is told by the write that met it; what is still in the buffer meets it again.
            if e.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise

    def about(self) -> File:
        return File(self._path.stat().st_size, self._hash.hexdigest())


class _Tee:
    def __init__(self, file, digest) -> None:
        self._file, self._digest = file, digest

    def write(self, data) -> None:
        self._file.write(data)
        self._digest.update(data)


def _bits(dtype: torch.dtype) -> torch.dtype:
    """NumPy has no bfloat16: its bits are kept as integers, and the manifest says what they are."""
    return torch.int16 if dtype == torch.bfloat16 else dtype


def _descr(dtype: torch.dtype) -> str:
    return torch.empty(0, dtype=dtype).numpy().dtype.str


def _check_file(path: Path, file: File) -> None:
    if path.is_symlink() or not path.is_file() or path.stat().st_size != file.bytes or _digest(path) != file.blake2b:
        raise Damaged(f"{path} is not what was written there")


def _offset(path: Path, column: Column, n: int) -> int:
    """Where the rows of a `.npy` file begin, if they are `n` of this column."""
    with open(path, "rb") as f:
        try:
            np.lib.format.read_magic(f)
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(f)
        except ValueError as e:
            raise Damaged(f"{path} is not what was written there ({e})") from e
        whole = f.tell() + n * column.bytes == os.fstat(f.fileno()).st_size
        if (shape, fortran, dtype.str) != ((n, *column.shape), False, _descr(_bits(column.dtype))) or not whole:
            raise Damaged(f"{path} does not hold the rows that its manifest tells of")
        return f.tell()


def _hash():
    return hashlib.blake2b(digest_size=16)


def _digest(path: Path) -> str:
    digest = _hash()
    try:
        with open(path, "rb") as f:
            while chunk := f.read(_CHUNK):
                digest.update(chunk)
    except OSError as e:
        if e.errno == errno.EIO:
            raise Damaged(f"{path} cannot be read: {e.strerror}") from e
        raise
    return digest.hexdigest()


def _sync_directory(path: Path) -> None:
    if os.name == "posix":
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
