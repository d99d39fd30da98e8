"""Rows: what one item leaves in a cache, made batch by batch with the learner's own loaders and in its own precision."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.progress import ProgressCallback
from fastai.learner import Learner
from fastprogress.fastprogress import progress_bar
from torch import Tensor

from ..cache import Column, Table, size
from ..outside.fastai import to_device
from ..outside.torch import tree_map
from ..prefix import Cut, Refused, collect, gap
from .draws import watched
from .loaders import BatchLayout, batch_size, in_order, n_items, plain
from .refusals import all_the_same

SHARED_BOUND = (
    1e-5  # a larger difference, as a share of the largest number, is another computation and not another rounding
)


@dataclass(frozen=True, eq=False)
class Task:
    """One table to fill: its name, the number of its loader and the loader, the columns and the layout of batches."""

    name: str
    set: int
    loader: object
    columns: tuple[Column, ...]
    layout: BatchLayout

    @property
    def n(self) -> int:
        """How many rows the table has."""
        return n_items(self.loader)

    @property
    def bytes(self) -> int:
        """How many bytes it has."""
        return size(self.columns, self.n)


@dataclass(frozen=True, eq=False)
class Maker:
    """Makes rows with the learner's network, at the cut."""

    learn: Learner
    cut: Cut

    def row(self, task: Task, batch) -> list[Tensor]:
        """The rows of one batch, in the columns of `task`.

        Raises:
            Refused: they do not fit.
        """
        batch = to_device(self.learn, batch)
        with precision(self.learn):
            features = collect(self.learn.model, self.cut, split(self.learn, batch)[0])
        parts = [*(form.rows(t) for form, t in zip(self.cut.forms, features, strict=True)), *task.layout.rows(batch)]
        if any(t.shape[1:] != column.shape for column, t in zip(task.columns, parts, strict=True)):
            raise Refused(
                "the features of two batches differ in shape, so they do not fit in one table. Resize or pad all items "
                "alike, or fit without the cache"
            )
        return [t.to("cpu", column.dtype) for column, t in zip(task.columns, parts, strict=True)]

    def rows(self, task: Task, text: str, watch: str | None = None) -> Iterator[list[Tensor]]:
        """The rows of one table, batch after batch, with a progress bar where the learner shows one.

        Raises:
            Refused: an item is drawn at random, where `watch` names the set; or the loader leaves items out.
        """
        # A short last training batch would meet other kernels than a full one, and differ in the last bits.
        short = 0 if task.set else -task.n % batch_size(task.loader)
        items, done = [*range(task.n), *(i % task.n for i in range(short))], 0
        shared: list[Tensor] = []  # rows that all batches share
        loader = in_order(task.loader, items)
        with nullcontext() if watch is None else all_the_same(watch):
            for batch in self._with_bar(loader if watch is None else watched(loader), text):
                some = self.row(task, batch)
                done += len(some[-1])
                same = [t for t, column in zip(some, task.columns, strict=True) if not column.per_item]
                shared = shared or same
                if any(gap(a, b) > SHARED_BOUND for a, b in zip(shared, same, strict=True)):
                    raise Refused(
                        f"the frozen part ({', '.join(self.cut.names)}) mixes the items of a batch: a tensor without a "
                        "dimension for items differs between batches; fit without the cache"
                    )
                yield some
        if done != len(items):
            raise Refused(f"the loader leaves out {len(items) - done:,} of {len(items):,} items; fit without the cache")

    def same(self, task: Task, table: Table, items: Sequence[int], bound: float) -> bool:
        """Whether the rows of these items in `table` are what the network makes of them now."""
        if (table.columns, table.n) != (task.columns, task.n):
            return False
        fresh, kept = self.row(task, batch_of(self.learn, task.loader, items)), table.take(torch.tensor(list(items)))
        n = len(self.cut.forms)
        features = all(gap(a, b) <= bound for a, b in zip(kept[:n], fresh[:n], strict=True))
        return features and all(gap(a, b) == 0 for a, b in zip(kept[n:], fresh[n:], strict=True))

    def _with_bar(self, loader, text: str):
        shown = next((cb for cb in self.learn.cbs if isinstance(cb, ProgressCallback)), None)
        if shown is None:
            return loader
        bar = progress_bar(loader, parent=vars(shown).get("mbar"), leave=False)
        bar.comment = text
        return bar


def columns_of(cut: Cut, layout: BatchLayout, dtype: torch.dtype | None) -> tuple[Column, ...]:
    """The columns of a table: the live tensors, in `dtype` where one is asked for, then what is kept of a batch."""
    features = [
        Column((f.width,), (dtype or f.dtype) if f.dtype.is_floating_point else f.dtype, f.item_dim is not None)
        for f in cut.forms
    ]
    return (*features, *layout.columns())


def split(learn: Learner, batch: Sequence) -> tuple[tuple, tuple]:
    """The inputs, as the network gets them, and the targets of a batch."""
    i = getattr(learn.dls, "n_inp", 1 if len(batch) == 1 else len(batch) - 1)
    return tree_map(plain, tuple(batch[:i])), tuple(batch[i:])


def batch_of(learn: Learner, dl, items: Sequence[int]):
    """One batch of these items, on the device of the network.

    Raises:
        Refused: they do not make one.
    """
    items = list(items)
    try:
        batch = next(iter(in_order(dl, items, bs=len(items), num_workers=0)))
    except RuntimeError as e:
        raise Refused(
            f"items from the whole set do not fit in one batch ({str(e).strip().splitlines()[0]}); a cache needs one shape "
            "for all. Resize or pad them alike, or fit without the cache"
        ) from e
    return to_device(learn, batch)


def precision(learn: Learner) -> AbstractContextManager:
    """What the learner's forward runs in: autocast under mixed precision."""
    mixed = next((cb for cb in learn.cbs if isinstance(cb, MixedPrecision)), None)
    return nullcontext() if mixed is None else mixed.autocast
