"""Serving: batches made from rows instead of from files, in the order and with the random draws of the loader they replace.

What a loader does besides reading items stays its own: it orders, shuffles, weighs and drops as before.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from fastai.data.load import DataLoader
from torch import Tensor
from torch.utils import data as torch_data

from ..cache import Column, Table
from ..outside.torch import TreeSpec, tree_flatten, tree_unflatten, written_times
from ..prefix import Cut, Placeholder, Refused, Replay, instead_of
from ..prefix.placeholder import Stands
from ..undo import as_it_is


@dataclass(frozen=True)
class BatchLayout:
    """How a batch is made: for each leaf an item of it, and whether its values are kept or only its shape."""

    spec: TreeSpec
    items: tuple[Tensor, ...]
    kept: tuple[bool, ...]

    def columns(self) -> list[Column]:
        """One column a kept leaf."""
        return [Column(tuple(t.shape[1:]), t.dtype) for t, keep in zip(self.items, self.kept, strict=True) if keep]

    def rows(self, batch) -> list[Tensor]:
        """The kept leaves of a batch that is like the first one.

        Raises:
            Refused: it is not.
        """
        leaves, spec = _leaves(batch), tree_flatten(batch)[1]
        if spec != self.spec:
            raise Refused(
                f"two batches differ in what they are made of ({self.spec} and {spec}); a cache needs one kind for all. Make "
                "all items alike, or fit without the cache"
            )
        for one, t in zip(self.items, leaves, strict=True):
            if one.shape[1:] != t.shape[1:] or one.dtype != t.dtype:
                raise Refused(
                    f"items of shape {tuple(one.shape[1:])} and {tuple(t.shape[1:])} came in two batches; a cache needs one "
                    "shape for all. Resize or pad them alike, or fit without the cache"
                )
        return [plain(t) for t, keep in zip(leaves, self.kept, strict=True) if keep]


def batch_layout(batch, cut: Cut, *, whole: bool = False) -> BatchLayout:
    """The layout of batches like this one: targets are kept, inputs if `whole` or if the network reads them past the cut."""
    leaves = _leaves(batch)
    kept = tuple(whole or i >= cut.n_inputs or i in cut.inputs for i in range(len(leaves)))
    return BatchLayout(tree_flatten(batch)[1], tuple(t[:1].clone() for t in leaves), kept)


def plain(t: Tensor) -> Tensor:
    """`t` without fastai's type, as the network gets it."""
    return t.as_subclass(Tensor)


def _leaves(batch) -> list[Tensor]:
    leaves = tree_flatten(batch)[0]
    if not all(isinstance(t, Tensor) and t.dim() > 0 for t in leaves) or len({len(t) for t in leaves}) > 1:
        raise Refused("a batch is not tensors with one row an item, so it cannot be cached; fit without the cache")
    return leaves


def in_order(dl, items: Sequence[int], bs: int | None = None, **kwargs) -> DataLoader | torch_data.DataLoader:
    """A loader like `dl` that yields these items in this order, in batches of the same size, or of `bs`."""
    bs = batch_size(dl) if bs is None else bs
    if isinstance(dl, DataLoader):
        return dl.new(shuffle=False, drop_last=False, get_idxs=lambda: list(items), bs=bs, **kwargs)
    return torch_data.DataLoader(
        dl.dataset, bs, sampler=items, collate_fn=dl.collate_fn, **{"num_workers": dl.num_workers, **kwargs}
    )


def n_items(dl) -> int:
    """How many items `dl` draws from, the first of its dataset."""
    return dl.n if isinstance(dl, DataLoader) else len(dl.dataset)


def batch_size(dl) -> int:
    """How many items make a full batch."""
    return dl.bs if isinstance(dl, DataLoader) else dl.batch_size


def spread(n: int, most: int) -> list[int]:
    """Up to `most` of `n` positions, from the whole range.

    >>> spread(10, 3), spread(2, 3)
    ([0, 3, 6], [0, 1])
    """
    return sorted({n * k // most for k in range(most)}) if n else []


def check_loader(dl) -> None:
    """Raise `Refused` for a loader whose items cannot be named by their position in a dataset."""
    kind = type(dl).__name__
    if isinstance(dl, DataLoader):
        whole = dl.indexed and dl.n is not None and dl.bs is not None
        if whole and type(dl).__iter__ is DataLoader.__iter__ and not {"create_batches", "sample"} & vars(dl).keys():
            return
    elif isinstance(dl, torch_data.DataLoader) and dl.batch_size is not None:
        if not isinstance(dl.dataset, torch_data.IterableDataset):
            return
    raise Refused(
        f"the {kind} makes its batches in a way of its own, not by the position of items in a dataset; fit without the cache"
    )


@dataclass(frozen=True, eq=False)
class Served:
    """One batch that was served: its inputs, and how often each had been written into."""

    inputs: tuple[Tensor, ...]
    versions: tuple[int, ...]

    def is_what_came(self, leaves: Sequence) -> bool:
        """Whether these are the inputs as they were served: the same memory, shapes and numbers."""
        return len(leaves) == len(self.inputs) and all(map(_same, leaves, self.inputs, self.versions))


def _same(t, served: Tensor, version: int) -> bool:
    if isinstance(served, Placeholder) or isinstance(t, Placeholder) or not isinstance(t, Tensor):
        return t is served
    at = (t.data_ptr(), t.shape, t.stride(), t.dtype)
    return at == (served.data_ptr(), served.shape, served.stride(), served.dtype) and written_times(t) == version


class CachedLoader:
    """Yields the batches of `source` from the rows of `tables`, the one whose `turn` it is."""

    def __init__(self, source, tables: Sequence[Table], layout: BatchLayout, cut: Cut, replay: Replay, device) -> None:
        self.source, self.turn, self._tables = source, 0, tables
        self._layout, self._forms, self._replay, self._device = layout, cut.forms, replay, device
        self._n_inputs = cut.n_inputs
        self._stands = [Stands(f"input {i} of the batch", replay.gate) for i in range(len(layout.items))]
        self._like = [plain(t).to(device) for t in layout.items]
        self.served: Served | None = None

    def __len__(self) -> int:
        return len(self.source)

    def __getattr__(self, name: str):
        return getattr(self.source, name)

    def __reduce__(self) -> tuple:
        # What is copied or saved is the loader that this one stands for: no rows, and no network.
        return as_it_is, (self.source,)

    def __iter__(self) -> Iterator:
        table = self._tables[self.turn % len(self._tables)]
        for items in _batches_of_items(self.source):
            yield self._batch(table, items)

    def _batch(self, table: Table, items: Tensor):
        rows, n = table.take(items), len(items)
        features = [
            form.whole(r.to(self._device, form.dtype, non_blocking=True), n)
            for form, r in zip(self._forms, rows, strict=False)
        ]
        kept = iter(rows[len(self._forms) :])
        leaves: list[Tensor] = []
        for i, (one, keep) in enumerate(zip(self._layout.items, self._layout.kept, strict=True)):
            if not keep:
                leaves.append(instead_of(self._like[i], n, self._stands[i]))
                continue
            t = next(kept).to(self._device, non_blocking=True)
            leaves.append(t if type(one) is Tensor else t.as_subclass(type(one)))
        inputs = tuple(leaves[: self._n_inputs])
        self.served = Served(inputs, tuple(0 if isinstance(t, Placeholder) else written_times(t) for t in inputs))
        self._replay.set(features, n)
        return tree_unflatten(leaves, self._layout.spec)


def _batches_of_items(dl) -> Iterator[Tensor]:
    """The positions that make each batch of `dl`, with every random draw that `dl` itself would make."""
    if not isinstance(dl, DataLoader):
        yield from _batches_of_torch(dl)
        return
    dl.randomize()
    dl.before_iter()
    items = dl.get_idxs()
    # Behind each fastai loader is one of torch's, which draws a seed for its workers at the start of an epoch.
    torch.empty((), dtype=torch.int64).random_()
    for some in torch.tensor(items).split(dl.bs):
        if len(some) == dl.bs or not dl.drop_last:
            yield some
    dl.after_iter()


_started: weakref.WeakSet = weakref.WeakSet()  # torch's loaders whose workers would be running


def _batches_of_torch(dl: torch_data.DataLoader) -> Iterator[Tensor]:
    # Workers that persist draw their seed once, when they start; others in every epoch.
    running = dl in _started or vars(dl).get("_iterator") is not None
    if not (dl.persistent_workers and running):
        torch.empty((), dtype=torch.int64).random_(generator=dl.generator)
    if dl.persistent_workers:
        _started.add(dl)
    for some in dl.batch_sampler or ():
        yield torch.tensor(list(some))
