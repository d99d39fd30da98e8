"""The key of a cache on disk: weights, code, data, transforms and settings, all that its rows follow from.

Files count with their contents, so a key reads every file that the data set names: a fill reads and decodes them anyway, a
second run reads them for the key alone. Some items are read as well, spread over the data set: what they look like counts,
and a file that they open and that nothing in the data set names cannot be known, so it is refused.
"""

from __future__ import annotations

import builtins
import io
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import MethodType

import torch
from fastai.callback.core import Callback
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.hook import Hook
from fastai.data.load import DataLoader
from fastai.learner import Learner
from torch import nn

from ..cache.code import installed
from ..cache.identity import Walk, identity, parts_of_network
from ..callbacks import FrozenEval
from ..groups import LayerGroup
from ..prefix import Cut, Refused
from .loaders import batch_size, in_order, spread
from .rows import Task, split

_SAMPLE = 32  # items whose looks count
_SYSTEM = ("/proc/", "/sys/", "/dev/")


def cache_key(
    learn: Learner,
    groups: Sequence[LayerGroup],
    cut: Cut,
    tasks: Sequence[Task],
    frozen_part: tuple,
    kind: tuple,
    views: int,
    data_id: str | None,
) -> str:
    """32 hexadecimal digits that are the same for the same rows, in another process too.

    Raises:
        Refused: nothing tells the network or the data from others.
    """
    contract = next(cb.contract for cb in learn.cbs if isinstance(cb, FrozenEval))
    mixed = next((str(vars(cb).get("amp_mode")) for cb in learn.cbs if isinstance(cb, MixedPrecision)), None)
    layout = [(t.name, t.n, batch_size(t.loader), repr(t.columns), repr(t.layout.spec), t.layout.kept) for t in tasks]
    numbers = (
        *(
            torch.__version__,
            sys.version_info[:2],
            torch.get_default_dtype(),
            torch.get_float32_matmul_precision(),
            mixed,
        ),
        *([torch.initial_seed()] if views > 1 else []),
    )
    settings = (frozen_part, repr(cut.live), repr(cut.forms), cut.inputs, str(contract), kind, layout, numbers)
    try:
        network = identity(list(_network(learn.model, groups, cut)))
    except TypeError as e:
        raise Refused(
            f"{e}, so a cache on disk could not know this network again; leave directory out to keep it in memory"
        ) from e
    if data_id is not None:
        return identity(network, settings, "named", data_id)
    try:
        return _with_data(learn, tasks, (network, settings), views)
    except TypeError as e:
        raise Refused(
            f"{e}, so a cache on disk could not know its data again; name them with data_id='...', or leave directory out"
        ) from e


def _with_data(learn: Learner, tasks: Sequence[Task], before: tuple, views: int) -> str:
    loaders = {t.set: t for t in tasks}
    with files_opened() as opened:
        some = {i: _looks(learn, t) for i, t in loaders.items()}
    seen = [x for i, x in some.items() if i or views == 1]  # others are drawn at random
    return Walk(opened).of([before, *(_makers(t.loader) for t in loaders.values()), seen])


def _looks(learn: Learner, task: Task) -> list:
    items = spread(task.n, _SAMPLE)
    return [list(split(learn, b)) for b in in_order(task.loader, items, bs=1, num_workers=0)]


def _makers(dl) -> list:
    """All that makes a batch: the data set, and the code and transforms of the loader."""
    names = ["collate_fn", "after_item", "before_batch", "after_batch", *getattr(dl, "_methods", ())]
    own = {n: getattr(dl, n, None) for n in dict.fromkeys(names)}
    # A bound method of the loader's own is told by its class.
    own = {n: f for n, f in own.items() if not (isinstance(f, MethodType) and f.__self__ is dl and n not in vars(dl))}
    return [type(dl), dl.dataset, own, dl.n if isinstance(dl, DataLoader) else len(dl.dataset)]


def _network(model: nn.Module, groups: Sequence[LayerGroup], cut: Cut) -> Iterator:
    """The code and attributes of every module, the buffers but for those of trained groups, and hooks before the cut.

    The numbers of frozen parameters are in the fingerprints; those that train have no part in the rows.
    """
    trained = {
        id(m)
        for g in groups
        if any(p.requires_grad for p in g.params())
        for top in g.modules.values()
        for m in top.modules()
    }
    inside = {id(m) for top in cut.modules.values() for m in top.modules()}
    for name, module in model.named_modules():
        yield name
        yield type(module)
        yield list(parts_of_network(module, contents=False))
        if id(module) not in trained:
            yield dict(module._buffers)
        if id(module) in inside:
            for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values()):
                # Of a callback's hook the code: what the callback holds is the fit's, and the first rows are compared anyway.
                own = getattr(hook, "__self__", None)
                yield (type(own), hook.__func__) if isinstance(own, Callback | Hook) else hook


@contextmanager
def files_opened() -> Iterator[list[str]]:
    """The files, by real path, that Python opens to read meanwhile, but for those of installed packages."""
    found: dict[str, None] = {}

    def watched(real: Callable):
        def opening(file, mode="r", *args, **kwargs):
            if isinstance(file, str | bytes | os.PathLike) and not (isinstance(mode, str) and set("wax") & set(mode)):
                found[os.path.realpath(os.fsdecode(file))] = None
            return real(file, mode, *args, **kwargs)

        return opening

    before = builtins.open, io.open
    listed: list[str] = []
    try:
        builtins.open, io.open = watched(before[0]), watched(before[1])
        yield listed
    finally:
        builtins.open, io.open = before
        listed += [p for p in found if os.path.isfile(p) and not p.startswith(_SYSTEM) and not installed(p)]
