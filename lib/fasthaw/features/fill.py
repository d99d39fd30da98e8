"""Filling: what could make a cache wrong is looked for, the cut is found and proved, then every item is computed once."""

from __future__ import annotations

import hashlib
import random
import threading
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from fastai.learner import Learner

from ..freezing import fingerprints, frozen, leaking_noise
from ..groups import LayerGroup
from ..tables import wrapped
from ..untouched import untouched
from ..words import at_least, flag, number, shown, wanted
from .cut import Cut, Refused, find_cut
from .fold import fast_copy
from .key import cache_key
from .loader import Layout, batch_size, check_loader, layout_of, n_items, spread
from .manifest import Damaged
from .playback import proved
from .refusals import check_learner, check_prepared, check_same_twice
from .rows import Maker, Task, columns_of, first_batch, precision, split
from .store import Folder, Table, gigabytes, in_memory

_BOUND = 1e-5  # a larger difference, as a share of the largest output, is another computation and not another rounding
_DTYPES = (None, torch.float32, torch.float16, torch.bfloat16)
_ASKED = 8  # items that tell whether a cache still holds
_SETS = ("training", "validation")
# Random states belong to the process: another thread's fill would move those that this one watches and puts back.
_ONE_AT_A_TIME = threading.RLock()


@dataclass(frozen=True)
class CacheSettings:
    """How a cache is kept; the fields are the arguments of `cached_features`.

    Raises:
        ValueError: a setting that is out of range.
    """

    directory: Path | None = None
    memory: float = 4.0
    dtype: torch.dtype | None = None
    views: int = 1
    data_id: str | None = None
    fast_fill: bool = False
    keep: int | None = None

    def __post_init__(self) -> None:
        at_least(1, self.views, "views is how many random draws of an item are cached")
        if not any(self.dtype is d for d in _DTYPES):
            raise ValueError(f"dtype is None, torch.float32, torch.float16 or torch.bfloat16; {shown(self.dtype)} came")
        number(self.memory, "memory is how many gigabytes a cache may take")
        if (
            self.data_id is not None
            and not wanted(str, self.data_id, "data_id is a name for data and transforms").strip()
        ):
            raise ValueError("data_id is a name for data and transforms; an empty one came")
        flag(self.fast_fill, "fast_fill")

        if self.keep is not None:
            at_least(1, self.keep, "keep is how many finished caches are left in the directory")

    @property
    def bytes(self) -> int:
        """The memory that a cache may take."""
        return int(self.memory * 1e9)

    @property
    def bound(self) -> float:
        """How far kept features may be from computed ones, as a share of the largest."""
        return 2e-2 if self.fast_fill or self.dtype in (torch.float16, torch.bfloat16) else 1e-4


@dataclass(frozen=True)
class CacheReport:
    """What was cached: prints itself. `difference` is that of one batch run both ways, as a share of the largest output."""

    after: tuple[str, ...]
    items: int
    bytes: int
    where: str
    seconds: float
    difference: float
    reused: bool

    def __str__(self) -> str:
        how = "reused" if self.reused else f"filled in {self.seconds:.1f} s"
        same = "equal to the last bit" if self.difference == 0 else f"equal within {self.difference:.1g}"
        return wrapped(
            f"{self.items:,} items cached after {', '.join(self.after)}: {gigabytes(self.bytes)} {self.where}, {how}. "
            f"One batch with and without the cache: {same}."
        )

    __repr__ = __str__


@dataclass(frozen=True, eq=False)
class Cached:
    """One filled cache: the cut, and for each loader by number its tables and the layout of its batches."""

    cut: Cut
    maker: Maker
    tasks: tuple[Task, ...]
    named: dict[str, Table]
    holds_for: tuple
    report: CacheReport

    def sets(self) -> list[tuple[object, list[Table], Layout]]:
        """Each loader with its tables, one a view, and its layout."""
        return [
            (task.loader, [self.named[t.name] for t in self.tasks if t.set == task.set], task.layout)
            for task in {t.set: t for t in self.tasks}.values()
        ]


def filled(learn: Learner, groups: Sequence[LayerGroup], settings: CacheSettings, before: Cached | None) -> Cached:
    """A cache for the fit that `learn` is beginning, in the modes of training: `before` where it still holds.

    Random state, modes and everything else in the learner are left as they are.

    Raises:
        Refused: it cannot be cached without changing what the fit learns.
        OSError: the disk is full.
    """
    check_learner(learn)
    loaders = [learn.dls[i] for i in range(min(2, len(learn.dls.loaders)))]
    for dl in loaders:
        check_loader(dl)
    loaders = {i: dl for i, dl in enumerate(loaders) if n_items(dl)}
    prints = fingerprints(g for g, f in zip(groups, frozen(groups), strict=True) if f)
    device = next(learn.model.parameters()).device
    holds_for = (frozen(groups), tuple(prints.items()), str(device), tuple(map(id, loaders.values())))
    may = before is not None and before.holds_for == holds_for
    with _ONE_AT_A_TIME, untouched(learn.model):
        if may and _right(before.maker, before.tasks, before.named, settings, _ASKED):
            return before
        return _fill(learn, groups, settings, loaders, holds_for)


def _fill(
    learn: Learner, groups: Sequence[LayerGroup], settings: CacheSettings, loaders: dict, holds_for: tuple
) -> Cached:
    started = time.perf_counter()
    for i, dl in loaders.items():
        if i or settings.views == 1:
            check_same_twice(dl, spread(n_items(dl), batch_size(dl)), _SETS[i])
    check_prepared(learn, first_batch(learn, loaders[0]))
    inputs = split(learn, first_batch(learn, loaders[0]))[0]
    cut, apart = _proved_cut(learn, groups, inputs)
    maker = Maker(learn, learn.model, cut)
    if settings.fast_fill:
        with precision(learn):
            maker = Maker(learn, *fast_copy(learn.model, cut, inputs), fast=True)
    del inputs  # one batch in memory at a time
    tasks = _tasks(loaders, {i: layout_of(first_batch(learn, dl), cut) for i, dl in loaders.items()}, cut, settings)
    needed, n = sum(t.bytes for t in tasks), sum(n_items(dl) for dl in loaders.values())
    if settings.directory is None and needed > settings.bytes:
        raise Refused(
            f"the cache of {n:,} items after {', '.join(cut.names)} takes {gigabytes(needed)}, more than memory="
            f"{settings.memory:g} GB; name a directory to keep it in, allow more memory, or halve it with dtype=torch.float16"
        )
    key = None
    if settings.directory is not None:
        kind = (settings.dtype, settings.views, settings.fast_fill)
        key = cache_key(learn, groups, cut, tasks, holds_for[:3], kind, settings.views, settings.data_id)
    named, reused = _tables(maker, tasks, settings, key)
    where = "in memory" if not any(t.on_disk for t in named.values()) else f"in {settings.directory}"
    report = CacheReport(cut.names, n, needed, where, time.perf_counter() - started, apart, reused)
    return Cached(cut, maker, tasks, named, holds_for, report)


def _proved_cut(learn: Learner, groups: Sequence[LayerGroup], inputs: tuple) -> tuple[Cut, float]:
    with precision(learn):
        cut = find_cut(learn.model, groups, inputs)
    cut, apart = proved(learn.model, cut, inputs, partial(precision, learn))
    if apart <= _BOUND:
        return cut, apart
    name = leaking_noise(learn.model, groups, frozen(groups), inputs)
    if name is not None:
        raise Refused(
            f"{name} makes noise inside the frozen layers; set its own dropout to 0, or fit without the cache"
        )
    raise Refused(
        f"with the output of {', '.join(cut.names)} kept, one batch comes out different (by {apart:.1g} of the largest "
        "output): something else crosses from the frozen layers to the trained ones. Cut elsewhere (another number of "
        "frozen groups), or fit without the cache"
    )


def _tasks(loaders: dict, layouts: dict[int, Layout], cut: Cut, settings: CacheSettings) -> tuple[Task, ...]:
    return tuple(
        Task(f"{_SETS[i]}{view}", i, dl, columns_of(cut, layouts[i], settings.dtype), layouts[i])
        for i, dl in loaders.items()
        for view in range(1 if i else settings.views)
    )


def _tables(maker: Maker, tasks: Sequence[Task], settings: CacheSettings, key: str | None) -> tuple[dict, bool]:
    """The tables by name, and whether an earlier run had filled them."""
    where = "in memory" if key is None else f"in {settings.directory}"

    def rows(task: Task):
        what = f"{task.n:,} {_SETS[task.set]} items after {', '.join(maker.cut.names)}"
        watch = _SETS[task.set] if task.set or settings.views == 1 else None
        if watch is None and key is not None:
            _seed(f"{key} {task.name}")
        return maker.rows(task, f"caching {what}: {gigabytes(task.bytes)} {where}", watch)

    if key is None:
        return {t.name: in_memory(t.columns, t.n, rows(t)) for t in tasks}, False
    folder = Folder(settings.directory, key)
    while True:
        named = _kept(folder, maker, tasks, settings)
        if named is not None:
            return named, True
        with folder.writing(sum(t.bytes for t in tasks), settings.keep) as writer:
            if writer is not None:
                for task in tasks:
                    writer.table(task.name, task.columns, task.n, rows(task))
        if writer is not None:
            return folder.tables(settings.bytes), False


def _seed(text: str) -> None:
    """Let random draws follow from `text`, so that the same ones are found on disk as would be made; the caller puts back."""
    seed = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "big")
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def _kept(folder: Folder, maker: Maker, tasks: Sequence[Task], settings: CacheSettings) -> dict | None:
    """The tables that an earlier run left in `folder`, if they are whole and still right."""
    try:
        named = folder.tables(settings.bytes)
    except Damaged as e:
        warnings.warn(f"{e}; the cache is filled again", stacklevel=2)
        return None
    if named is None or (named.keys() == {t.name for t in tasks} and _right(maker, tasks, named, settings)):
        return named
    warnings.warn(f"{folder.path} holds other features than the network makes now; it is filled again", stacklevel=2)
    return None


def _right(maker: Maker, tasks: Sequence[Task], named: dict, settings: CacheSettings, most: int | None = None) -> bool:
    """Whether rows are what the network makes of the first batch, or of its first items; not asked where draws are random."""
    asked = [t for t in tasks if t.set or settings.views == 1]
    batches = {t.set: first_batch(maker.learn, t.loader, most) for t in asked}
    return all(maker.same(t, named[t.name], batches[t.set], settings.bound) for t in asked)
