"""Filling: what could make a cache wrong is looked for, the cut found, every item computed once, and the rows proved."""

from __future__ import annotations

import hashlib
import random
import threading
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from fastai.learner import Learner

from ..cache import Damaged, Folder, Table, gigabytes, in_memory
from ..callbacks import FrozenEval
from ..freezing import fingerprints, frozen, leaking_noise
from ..groups import LayerGroup
from ..outside.torch import tree_map
from ..prefix import Cut, Refused, find_cut, prove
from ..randomness import random_state, set_random_state
from ..untouched import untouched
from .key import cache_key
from .loaders import BatchLayout, batch_layout, batch_size, check_loader, n_items, spread
from .refusals import check_learner, check_prepared, check_same_twice
from .rows import SHARED_BOUND, Maker, Task, batch_of, columns_of, precision, split
from .settings import CacheReport, CacheSettings

_FEW = 8  # items of the proof before the fill, and in eval mode
_ASKED = 8  # items of each set that tell at the start of a fit whether a cache still holds
_SETS = ("training", "validation")
# Random states belong to the process: another thread's fill would move those that this one watches and puts back.
_ONE_AT_A_TIME = threading.RLock()


@dataclass(frozen=True, eq=False)
class Cached:
    """One filled cache: the cut, and for each loader by number its tables and the layout of its batches."""

    cut: Cut
    maker: Maker
    tasks: tuple[Task, ...]
    named: dict[str, Table]
    holds_for: tuple
    report: CacheReport

    def sets(self) -> list[tuple[object, list[Table], BatchLayout]]:
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
    found = [learn.dls[i] for i in range(min(2, len(learn.dls.loaders)))]
    for dl in found:
        check_loader(dl)
    loaders = {i: dl for i, dl in enumerate(found) if n_items(dl)}
    prints = fingerprints(g for g, f in zip(groups, frozen(groups), strict=True) if f)
    holds_for = (frozen(groups), tuple(prints.items()), str(_device(learn)), tuple(map(id, loaders.values())))
    may = before is not None and before.holds_for == holds_for
    if not may:
        _look(learn, loaders[0])
    with _ONE_AT_A_TIME, untouched(learn.model):
        if before is not None and may and still_right(before, settings, _ASKED):
            return before
        return _fill(learn, groups, settings, loaders, holds_for)


def _look(learn: Learner, dl) -> None:
    """Let `FrozenEval` look whether a held flag means more than noise: on placeholders, in the fit, nobody could tell."""
    state = random_state()
    try:
        inputs = split(learn, batch_of(learn, dl, spread(n_items(dl), 2)))[0]
        for holder in (cb for cb in learn.cbs if isinstance(cb, FrozenEval)):
            holder.keeper.look(learn.model, inputs, {})
    finally:
        set_random_state(state)


def _device(learn: Learner) -> torch.device:
    return next(learn.model.parameters()).device


def still_right(
    cached: Cached, settings: CacheSettings, most: int, sets: Sequence[int] = (0, 1), turn: int = 0
) -> bool:
    """Whether the rows of up to `most` items of each set, from all of it, are what the network makes of them now.

    Not asked where draws are random. Other turns ask other items.
    """
    for task in cached.tasks:
        if task.set in sets and (task.set or settings.views == 1):
            if n_items(task.loader) != task.n:
                return False
            items = [(i + turn) % task.n for i in spread(task.n, most)]
            if not cached.maker.same(task, cached.named[task.name], items, settings.bound):
                return False
    return True


def _fill(
    learn: Learner, groups: Sequence[LayerGroup], settings: CacheSettings, loaders: dict, holds_for: tuple
) -> Cached:
    started = time.perf_counter()
    for i, dl in loaders.items():
        if i or settings.views == 1:
            check_same_twice(dl, spread(n_items(dl), batch_size(dl)), _SETS[i])
    few = {i: batch_of(learn, dl, spread(n_items(dl), _FEW)) for i, dl in loaders.items()}
    check_prepared(learn, few[0])
    inputs = split(learn, few[0])[0]
    with precision(learn):
        cut = find_cut(learn.model, groups, inputs)
    apart = _proved(learn, groups, cut, inputs)
    tasks = _tasks(
        loaders, {i: batch_layout(b, cut, whole=settings.inputs == "keep") for i, b in few.items()}, cut, settings
    )
    needed, n = sum(t.bytes for t in tasks), sum(n_items(dl) for dl in loaders.values())
    if settings.directory is None and needed > settings.bytes:
        raise Refused(
            f"the cache of {n:,} items after {', '.join(cut.names)} takes {gigabytes(needed)}, more than memory="
            f"{settings.memory:g} GB; name a directory to keep it in, allow more memory, or halve it with dtype=torch.float16"
        )
    maker = Maker(learn, cut)
    key = None
    if settings.directory is not None:
        kind = (settings.dtype, settings.views, settings.inputs)
        key = cache_key(learn, groups, cut, tasks, holds_for[:3], kind, settings.views, settings.data_id)
    named, reused = _tables(maker, tasks, settings, key)
    apart = max([apart, *(_proved_rows(maker, task, named[task.name], settings) for task in tasks)])
    where = "in memory" if not any(t.on_disk for t in named.values()) else f"in {settings.directory}"
    seconds = time.perf_counter() - started
    report = CacheReport(cut.names, n, needed, where, seconds, apart, reused, settings.inputs == "keep")
    return Cached(cut, maker, tasks, named, holds_for, report)


def _proved(learn: Learner, groups: Sequence[LayerGroup], cut: Cut, inputs: tuple) -> float:
    """The difference that the cut makes for a few items, in both modes, before anything is filled."""
    apart = max(prove(learn.model, cut, inputs, training=t, context=precision(learn)) for t in (True, False))
    if apart <= SHARED_BOUND:
        return apart
    name = leaking_noise(learn.model, groups, frozen(groups), inputs)
    if name is not None:
        raise Refused(
            f"{name} makes noise inside the frozen layers; set its own dropout to 0, or fit without the cache"
        )
    raise Refused(
        f"with the output of {', '.join(cut.names)} kept, a batch comes out different (outputs or gradients, by {apart:.1g} "
        "of the largest): something else crosses from the frozen layers to the trained ones. Cut elsewhere (another number of "
        "frozen groups), or fit without the cache"
    )


def _proved_rows(maker: Maker, task: Task, table: Table, settings: CacheSettings) -> float:
    """The difference that rows make which were computed in other batches than they are used in.

    One batch of training items from the whole set, and a few of validation, are read and run again.

    Raises:
        Refused: it is more than rounding: what the frozen part computes of an item depends on the others in its batch.
    """
    if task.set == 0 and settings.views > 1:
        return 0.0  # other draws
    learn, cut = maker.learn, maker.cut
    # From the whole set, backwards: rows that are in the order of the items would be in another one.
    items = spread(task.n, _FEW if task.set else batch_size(task.loader))[::-1]
    rows = table.take(torch.tensor(items))
    device = _device(learn)
    features = [f.whole(r.to(device, f.dtype), len(items)) for f, r in zip(cut.forms, rows, strict=False)]
    batch = batch_of(learn, task.loader, items)
    task.layout.rows(batch)  # or it is refused
    inputs = split(learn, batch)[0]
    apart = prove(learn.model, cut, inputs, features, training=task.set == 0, context=precision(learn))
    if task.set == 0:
        few, parts = tree_map(lambda t: t[:_FEW], inputs), [f.rows(t) for f, t in zip(cut.forms, features, strict=True)]
        parts = [
            f.whole(r if f.item_dim is None else r[:_FEW], min(_FEW, len(items)))
            for f, r in zip(cut.forms, parts, strict=True)
        ]
        apart = max(apart, prove(learn.model, cut, few, parts, training=False, context=precision(learn)))
    if not apart <= settings.bound:
        raise Refused(
            f"items of other batches come out different with the output of {', '.join(cut.names)} kept (by {apart:.1g} of the "
            "largest output or gradient): what the frozen layers compute of an item depends on the other items in its batch. "
            "Cut elsewhere (another number of frozen groups), or fit without the cache"
        )
    return apart


def _tasks(loaders: dict, layouts: dict[int, BatchLayout], cut: Cut, settings: CacheSettings) -> tuple[Task, ...]:
    return tuple(
        Task(f"{_SETS[i]}{view}", i, dl, columns_of(cut, layouts[i], settings.dtype), layouts[i])
        for i, dl in loaders.items()
        for view in range(1 if i else settings.views)
    )


def _tables(
    maker: Maker, tasks: Sequence[Task], settings: CacheSettings, key: str | None
) -> tuple[dict[str, Table], bool]:
    """The tables by name, and whether an earlier run had filled them."""
    where = "in memory" if key is None else f"in {settings.directory}"

    def rows(task: Task):
        what = f"{task.n:,} {_SETS[task.set]} items after {', '.join(maker.cut.names)}"
        watch = _SETS[task.set] if task.set or settings.views == 1 else None
        if watch is None and key is not None:
            _seed(f"{key} {task.name}")
        return maker.rows(task, f"caching {what}: {gigabytes(task.bytes)} {where}", watch)

    if key is None or settings.directory is None:
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
            return folder.tables(settings.bytes) or {}, False


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
    if named is None or (named.keys() == {t.name for t in tasks} and _fresh(maker, tasks, named, settings)):
        return named
    warnings.warn(f"{folder.path} holds other features than the network makes now; it is filled again", stacklevel=2)
    return None


def _fresh(maker: Maker, tasks: Sequence[Task], named: dict, settings: CacheSettings) -> bool:
    """Whether the rows of the first batch of each set are what the network makes of it; not asked where draws are random."""
    asked = [t for t in tasks if t.set or settings.views == 1]
    return all(maker.same(t, named[t.name], range(min(t.n, batch_size(t.loader))), settings.bound) for t in asked)
