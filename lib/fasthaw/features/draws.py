"""Random items: whether reading an item moves a random state, looked for while every item is read.

Two readings of one batch would miss what only some items draw. A generator that is private to a data set moves no state that
can be seen; items from the whole set are read twice for those.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from fastai.data.core import Pipeline
from fastai.data.load import DataLoader
from torch.utils import data as torch_data

from ..cache import identity

_EDGE = "\x1e"  # around what is told: torch adds the traceback of a worker process to the message
_ASKED = 10  # readings that all have to move a random state where there are other threads
_AGAIN = 2  # further readings that tell whether a draw of fastai's Resize moved anything


class Drawn(Exception):
    """An item was drawn at random; `told` says what drew which numbers, in `_EDGE`s."""

    def __init__(self, told: str) -> None:
        super().__init__(told)

    @property
    def told(self) -> tuple[str, str]:
        """Who drew, and what, without the traceback of a worker process."""
        _, who, what, *_ = str(self).split(_EDGE)
        return who, what


def states() -> tuple:
    """The random state of Python, NumPy and torch on the CPU, and of a GPU that is in use in this process."""
    numpy: tuple = np.random.get_state()  # type: ignore[assignment]
    # A worker process may not ask a GPU; it was forked and cannot draw there either.
    used = torch.cuda.is_initialized() and torch_data.get_worker_info() is None
    device = torch.cuda.get_rng_state().numpy().tobytes() if used else b""
    torchs = torch.get_rng_state().numpy().tobytes()
    return random.getstate(), (numpy[1].tobytes(), *numpy[2:]), torchs, device


def watched(loader):
    """`loader`, which serves this purpose alone, changed in place so that each item that is drawn raises `Drawn`."""
    if isinstance(loader, DataLoader):
        loader.do_item = _Items(loader)
        loader.do_batch = _Part(loader.do_batch, "the collation of a batch")
        loader.after_batch = _stage(loader.after_batch)
        return loader
    kind = _ManyAtOnce if hasattr(loader.dataset, "__getitems__") else _Dataset
    # A loader of torch's does not let its data set be replaced.
    vars(loader)["dataset"] = kind(loader.dataset)
    loader.collate_fn = _Part(loader.collate_fn, "the collation of a batch")
    return loader


def is_random(f) -> bool:
    """Whether `f` is one of fastai's random transforms; known by name, as fastai.vision changes PIL when imported."""
    return any(c.__name__ == "RandTransform" for c in type(f).__mro__)


def transforms(dl) -> list:
    """The transforms in a loader of fastai's and its data set."""
    pipes = [getattr(dl, n, None) for n in ("after_item", "before_batch", "after_batch")]
    return [t for pipe in pipes for t in getattr(pipe, "fs", ())] + _of_dataset(dl.dataset)


def _of_dataset(dataset) -> list:
    lists = getattr(dataset, "tls", None) or [dataset]
    return [t for tl in lists for t in getattr(getattr(tl, "tfms", None), "fs", ())]


def _stage(f):
    return _Steps(f) if isinstance(f, Pipeline) else _Part(f, _named([f]))


class _Items:
    """In place of a loader's `do_item`."""

    def __init__(self, loader) -> None:
        self._do, self._loader = loader.do_item, loader
        self._create, loader.create_item = loader.create_item, self._created
        loader.after_item = _stage(loader.after_item)

    def __call__(self, s):
        return self._do(s)

    def _created(self, s):
        resized = [f for f in _of_dataset(self._loader.dataset) if is_random(f)]
        who = _named(resized) or _named_dataset(self._loader.dataset)
        read = partial(self._create, s)
        return _asked(read, who, s, lambda x: resized and all(map(_may_do_nothing, resized)) and _same(read, x))


class _Steps(Pipeline):
    """In place of a pipeline of transforms: each is asked. A loader tells a pipeline for which set it works, so it is one."""

    def __init__(self, pipe: Pipeline) -> None:
        self.__dict__.update(vars(pipe))

    def __call__(self, x):
        for f in self.fs:
            x = self._one(f, x)
        return x

    def _one(self, f, x):
        read = partial(f, x, split_idx=self.split_idx)
        nothing = lambda y: _idle(f, self.split_idx) or (_may_do_nothing(f, self.split_idx) and _same(read, y))  # noqa: E731
        return _asked(read, _named([f]), without_effect=nothing)


class _Part:
    """In place of a function: it may not draw."""

    def __init__(self, f, name: str) -> None:
        self._f, self._name = f, name

    def __call__(self, *args, **kwargs):
        return _asked(partial(self._f, *args, **kwargs), self._name)


class _Dataset:
    """In place of a data set of torch's."""

    def __init__(self, dataset) -> None:
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self._dataset)

    def __getattr__(self, name: str):
        if name == "_dataset":
            raise AttributeError(name)
        return getattr(self._dataset, name)

    def __getitem__(self, i):
        return _asked(partial(self._dataset.__getitem__, i), _named_dataset(self._dataset), i)


class _ManyAtOnce(_Dataset):
    def __getitems__(self, items):
        return _asked(partial(self._dataset.__getitems__, items), _named_dataset(self._dataset))


def _asked(read: Callable, who: str, item: int | None = None, without_effect: Callable = lambda value: False):
    """What `read` gives.

    Raises:
        Drawn: it moved a random state, or something did while it was asked, each time.
    """
    # Another thread that trains moves the random states as well, but hardly in each of many short readings.
    for _ in range(1 if threading.active_count() == 1 else _ASKED):
        before = states()
        value = read()
        after = states()
        if before == after:
            return value
        if without_effect(value):
            _put_back(before)
            return value
    # Another thread may move them all the time: then only what comes of further draws can tell.
    if threading.active_count() > 1 and _same(read, value):
        return value
    raise _drawn(who, before, after, item)


def _idle(f, split_idx: int | None = None) -> bool:
    """Whether one of fastai's random transforms draws, but does nothing: never, or not for this set."""
    return is_random(f) and (
        f.p == 0 or (f.split_idx is not None and split_idx is not None and f.split_idx != split_idx)
    )


def _may_do_nothing(f, split_idx: int | None = None) -> bool:
    """Whether draws of a transform of fastai's may be without effect, which is then tried.

    `Resize` draws where to cut also where nothing is cut, and what warps draws for validation items, which it leaves alone.
    """
    ours = is_random(f) and type(f).__module__.startswith("fastai.")
    return ours and (f.p == 0 or type(f).__name__ == "Resize" or bool(split_idx))


def _same(read, first) -> bool:
    """Whether further draws give the same."""
    known = identity(first)
    return all(identity(read()) == known for _ in range(_AGAIN))


def _put_back(before: tuple) -> None:
    """What was drawn for nothing is not counted; only states that a transform of fastai's on the CPU moves."""
    random.setstate(before[0])
    name, *_ = np.random.get_state()
    keys, *rest = before[1]
    np.random.set_state((name, np.frombuffer(keys, np.uint32), *rest))
    torch.set_rng_state(torch.frombuffer(bytearray(before[2]), dtype=torch.uint8))


def _named(fs: list) -> str:
    # fastai wraps a function in a transform that has its name.
    names = [getattr(f, "_name", None) or getattr(f, "__name__", None) or type(f).__name__ for f in fs]
    return " and ".join(dict.fromkeys(names))


def _named_dataset(dataset) -> str:
    return f"the data set ({type(dataset).__name__})"


def _drawn(who: str, before: tuple, after: tuple, item: int | None = None) -> Drawn:
    whose = [n for n, a, b in zip(("Python", "NumPy", "torch", "the GPU"), before, after, strict=True) if a != b]
    at = "" if item is None else f" at item {item}"
    others = "" if threading.active_count() == 1 else ", or another thread does"
    return Drawn(f"{_EDGE}{who}{_EDGE}it moves the random state of {' and '.join(whose)}{at}{others}{_EDGE}")
