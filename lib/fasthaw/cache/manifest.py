"""What a folder of rows holds, as a file that knows when it is damaged: it counts if it is to the byte what was written."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass

import torch

FORMAT = 2
_KINDS = (
    *("bool", "uint8", "int8", "int16", "int32", "int64"),
    *("float16", "bfloat16", "float32", "float64", "complex64", "complex128"),
)
DTYPES = {name: getattr(torch, name) for name in _KINDS}
_TABLE = re.compile(r"[A-Za-z0-9_]+")
_DIGEST = re.compile(r"[0-9a-f]{32}")


class Damaged(ValueError):
    """A file of a cache is not what was written."""


@dataclass(frozen=True)
class Column:
    """One tensor a row: its shape and dtype, and whether each item has its own or all share one."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    per_item: bool = True

    @property
    def bytes(self) -> int:
        """The bytes of one row."""
        n = self.dtype.itemsize
        for size in self.shape:
            n *= size
        return n


@dataclass(frozen=True)
class File:
    """One file of rows: the bytes it has and their digest."""

    bytes: int
    blake2b: str


@dataclass(frozen=True)
class Entry:
    """One table: how many rows, its columns, and the file of each."""

    n: int
    columns: tuple[Column, ...]
    files: tuple[File, ...]


def file_name(table: str, column: int) -> str:
    """Where a column of a table is."""
    return f"{table}-{column}.npy"


def encoded(key: str, tables: dict[str, Entry]) -> bytes:
    """The manifest of a cache as bytes."""
    about = {
        "format": FORMAT,
        "key": key,
        "tables": {
            name: {
                "n": e.n,
                "columns": [
                    {
                        "shape": list(c.shape),
                        "dtype": str(c.dtype).removeprefix("torch."),
                        "per_item": c.per_item,
                        "bytes": f.bytes,
                        "blake2b": f.blake2b,
                    }
                    for c, f in zip(e.columns, e.files, strict=True)
                ],
            }
            for name, e in tables.items()
        },
    }
    return _text({"blake2b": _digest(about), **about})


def decoded(raw: bytes, key: str) -> dict[str, Entry]:
    """The tables of a manifest.

    Raises:
        Damaged: it is not a manifest of this format and key, to the byte as it was written.
    """
    try:
        whole = json.loads(raw)
        about = {k: whole[k] for k in ("format", "key", "tables")}
        if whole["blake2b"] != _digest(about) or raw != _text({"blake2b": whole["blake2b"], **about}):
            raise Damaged("its checksum is another one")
        if about["format"] != FORMAT or about["key"] != key:
            raise Damaged(f"it is of format {about['format']} and key {about['key']}")
        return {_checked(_TABLE, name): _entry(e) for name, e in about["tables"].items()}
    except Damaged:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as e:
        raise Damaged(f"it cannot be read ({type(e).__name__})") from e


def _entry(about: dict) -> Entry:
    columns, files = [], []
    for c in about["columns"]:
        columns.append(Column(tuple(map(_count, c["shape"])), DTYPES[c["dtype"]], _flag(c["per_item"])))
        files.append(File(_count(c["bytes"]), _checked(_DIGEST, c["blake2b"])))
    return Entry(_count(about["n"]), tuple(columns), tuple(files))


def _count(value) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} is no count")
    return value


def _flag(value) -> bool:
    if type(value) is not bool:
        raise ValueError(f"{value!r} is neither true nor false")
    return value


def _checked(pattern: re.Pattern, text: str) -> str:
    if not pattern.fullmatch(text):
        raise ValueError(f"{text!r} is no name of ours")
    return text


def _text(about: dict) -> bytes:
    return json.dumps(about, indent=1).encode()


def _digest(about: dict) -> str:
    return hashlib.blake2b(json.dumps(about, sort_keys=True).encode(), digest_size=16).hexdigest()
