"""Features as tensors: what a frozen network makes of every item, for a linear probe, kNN, UMAP or another trainer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from fastai.learner import Learner
from torch import Tensor, nn

from ..freezing import frozen
from ..outside.fastai import to_device
from ..outside.torch import tree_leaves
from ..prefix import Refused, collect, find_cut
from ..prefix.proving import items_in
from ..prefix.structure import flatten
from ..splitters import layer_groups
from ..untouched import untouched
from ..words import a_path, did_you_mean, flag, wanted
from .loaders import check_loader, in_order, n_items, spread
from .rows import batch_of, precision, split


class Features(NamedTuple):
    """Features `X`, one row an item, targets `y`, and the positions `ids` of the items in their data set."""

    X: Tensor | np.ndarray
    y: Tensor | np.ndarray | tuple
    ids: Tensor | np.ndarray


def extract_features(learn: Learner, dl=None, *, at: str | None = None, numpy: bool = False) -> Features:
    """What the network makes of every item of a loader, in the order of the data set; nothing is changed.

    `X, y, ids = extract_features(learn, learn.dls.valid)`. The network runs in eval mode, without gradients, in the learner's
    precision; items are read once, as the loader of that set transforms them.

    Args:
        dl: a loader of the learner's; by default that of the training set.
        at: the dotted name of a module, whose output it is (the first tensor in it). By default what the trained layers read
            of the frozen ones, as `cached_features` keeps it.
        numpy: arrays instead of tensors.

    Returns:
        `X` `(n, ...)`, `y` `(n, ...)` or a tuple where there are several targets, `ids` `(n,)`; all on the CPU.

    Raises:
        ValueError: no module is called so, or it is not called; the output has not one row an item; without `at`, nothing is
            frozen, or the trained layers read several tensors.
    """
    wanted(Learner, learn, "extract_features takes a fastai Learner")
    flag(numpy, "numpy")
    dl = learn.dls.train if dl is None else dl
    check_loader(dl)
    modules = dict(learn.model.named_modules())
    if at is not None and at not in modules:
        raise ValueError(f"no module is called {at!r}{did_you_mean(at, modules)}")
    xs: list[Tensor] = []
    ys: list[list[Tensor]] = []
    with untouched(learn.model), torch.no_grad():
        learn.model.eval()
        of = _at_the_cut(learn, dl) if at is None else _at_module(learn.model, modules[at], at)
        for batch in in_order(dl, range(n_items(dl))):
            inputs, targets = split(learn, to_device(learn, batch))
            with precision(learn):
                x = of(inputs)
            if x.dim() == 0 or len(x) != items_in(inputs):
                raise Refused(
                    f"{at or 'the frozen part'} returns {tuple(x.shape)} for {items_in(inputs)} items, not one row each"
                )
            xs.append(x.cpu())
            ys.append([t.cpu().as_subclass(Tensor) for t in tree_leaves(targets)])
    if any(x.shape[1:] != xs[0].shape[1:] for x in xs):
        raise Refused("the features of two batches differ in shape; resize or pad all items alike")
    y = [torch.cat(column) for column in zip(*ys, strict=True)]
    found: list = [torch.cat(xs), torch.arange(n_items(dl)), *y]
    found = [t.numpy() for t in found] if numpy else found
    return Features(found[0], found[2] if len(y) == 1 else tuple(found[2:]), found[1])


def save_features(features: Features, path: str | Path) -> None:
    """Write `features` to a new safetensors file `path` as `X`, `y` (`y0`, `y1`, ... where there are several) and `ids`.

    It needs the `safetensors` package: `pip install fasthaw[features]`.

    >>> save_features(extract_features(learn), "rows.safetensors")  # doctest: +SKIP

    Raises:
        ModuleNotFoundError: it is not installed.
        FileExistsError: something stands there.
    """
    from safetensors.torch import save_file

    path = a_path(path, "path is where the features are written")
    if path.exists():
        raise FileExistsError(f"{path} exists; features are not written over it")
    y = features.y if isinstance(features.y, tuple) else None
    named = {
        "X": features.X,
        "ids": features.ids,
        **({"y": features.y} if y is None else {f"y{i}": t for i, t in enumerate(y)}),
    }
    save_file({name: torch.as_tensor(t).clone() for name, t in named.items()}, path)


def _at_the_cut(learn: Learner, dl) -> Callable[[tuple], Tensor]:
    """What the trained layers read of the frozen ones, one row an item; flags are left changed."""
    groups = layer_groups(learn)
    for g, is_frozen in zip(groups, frozen(groups), strict=True):
        for p in g.params():
            p.requires_grad_(p.requires_grad and not is_frozen)  # fastai leaves norm layers of a frozen group training
    inputs = split(learn, batch_of(learn, dl, spread(n_items(dl), 3)))[0]
    with precision(learn):
        cut = find_cut(learn.model, groups, inputs)
    if len(cut.live) > 1:
        raise ValueError(f"the trained layers read several tensors ({', '.join(cut.names)}); name one module with at=")
    form = cut.forms[0]

    def of(inputs: tuple) -> Tensor:
        t = collect(learn.model, cut, inputs)[0]
        return t if form.item_dim == 0 and form.each[0] == 1 else form.rows(t)

    return of


def _at_module(model: nn.Module, module: nn.Module, name: str) -> Callable[[tuple], Tensor]:
    """The first tensor that a module returns."""

    def of(inputs: tuple) -> Tensor:
        seen: list[Tensor] = []
        handle = module.register_forward_hook(lambda m, args, output: seen.extend(_tensors(output)))
        try:
            model(*inputs)
        finally:
            handle.remove()
        if not seen:
            raise ValueError(f"{name} is not called, or returns no tensor")
        return seen[0].detach().clone()

    return of


def _tensors(output) -> list[Tensor]:
    return [t for t in flatten(output)[0] if isinstance(t, Tensor)]
