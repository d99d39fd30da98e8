"""Caches that several runs share: what one has computed, another that freezes the same layers of the same learner reads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

_WHERE: ContextVar[tuple[Path, str] | None] = ContextVar("where caches are shared", default=None)


@contextmanager
def caches_shared(directory: Path, data_id: str) -> Iterator[None]:
    """Within it the cached stages of plans keep their caches in `directory`; `data_id` promises the same data, in order."""
    token = _WHERE.set((directory, data_id))
    try:
        yield
    finally:
        _WHERE.reset(token)


def where_shared() -> dict[str, Any]:
    """The arguments of `cached_features` that say so."""
    where = _WHERE.get()
    return {} if where is None else {"directory": where[0], "data_id": where[1]}
