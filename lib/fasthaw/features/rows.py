"""Rows: what one item leaves in a cache, made batch by batch with the learner's own loaders and in its own precision."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.progress import ProgressCallback
from fastai.learner import Learner
from fastprogress.fastprogress import progress_bar
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from .cut import Cut, Refused
from .draws import watched
from .fold import channels_last
from .loader import Layout, batch_size, in_order, n_items, plain
from .manifest import Column
from .playback import collect, gap
from .refusals import all_the_same
from .store import Table, size


@dataclass(frozen=True, eq=False)
class Task:
    """One table to fill: its name, the number of its loader and the loader, the columns and the layout of batches."""

    name: str
    set: int
    loader: object
    columns: tuple[Column, ...]
    layout: Layout

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
    """Makes rows with `model`, which is the learner's or a faster copy, at the cut on its modules."""

    learn: Learner
    model: nn.Module
    cut: Cut
    fast: bool = False

    def row(self, task: Task, batch) -> list[Tensor]:
        """The rows of one batch, in the columns of `task`.

        Raises:
            Refused: they do not fit.
        """
        batch = self.learn._set_device(batch)
        inputs = split(self.learn, batch)[0]
        with precision(self.learn, self.fast):
            features = collect(self.model, self.cut, channels_last(inputs) if self.fast else inputs)
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
        loader = in_order(task.loader, items)
        with nullcontext() if watch is None else all_the_same(watch):
            for batch in self._with_bar(loader if watch is None else watched(loader), text):
                some = self.row(task, batch)
                done += len(some[-1])
                yield some
        if done != len(items):
            raise Refused(f"the loader leaves out {len(items) - done:,} of {len(items):,} items; fit without the cache")

    def same(self, task: Task, table: Table, batch, bound: float) -> bool:
        """Whether the first rows of `table` are those of `batch`, its first items."""
        fresh = self.row(task, batch)
        if (table.columns, table.n) != (task.columns, task.n):
            return False
        kept = table.take(torch.arange(len(fresh[-1])))
        return all(gap(a, b) <= bound for a, b in zip(fresh, kept, strict=True))

    def _with_bar(self, loader, text: str):
        shown = next((cb for cb in self.learn.cbs if isinstance(cb, ProgressCallback)), None)
        if shown is None:
            return loader
        bar = progress_bar(loader, parent=vars(shown).get("mbar"), leave=False)
        bar.comment = text
        return bar


def columns_of(cut: Cut, layout: Layout, dtype: torch.dtype | None) -> tuple[Column, ...]:
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


def first(dl, most: int | None = None) -> range:
    """The first items of `dl`: a batch, or at most so many."""
    return range(min(most or batch_size(dl), batch_size(dl), n_items(dl)))


def first_batch(learn: Learner, dl, most: int | None = None):
    """The batch of those items, on the device of the network."""
    return learn._set_device(next(iter(in_order(dl, first(dl, most), num_workers=0))))


def precision(learn: Learner, fast: bool = False):
    """What the learner's forward runs in: autocast under mixed precision; a fast fill on an accelerator asks for it too."""
    mixed = next((cb for cb in learn.cbs if isinstance(cb, MixedPrecision)), None)
    if mixed is not None:
        return mixed.autocast
    if fast and next(learn.model.parameters()).is_cuda:
        return torch.autocast("cuda", torch.float16)
    return nullcontext()
