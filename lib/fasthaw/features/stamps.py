"""What data and a frozen part are now, cheaply: a stamp that is another one when somebody has changed them.

Looked at before every cached epoch. Labels, small arrays and tensors, attributes, and the globals that own code reads count
with their contents; of larger ones a sample and torch's own count of writes do, so that an epoch of a head is not spent on
reading images. The rows of a few items, made anew, are compared besides.
"""

from __future__ import annotations

import os
import zlib
from dataclasses import dataclass
from functools import partial
from pathlib import PurePath
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType

import numpy as np
import pandas as pd
import torch
from fastai.data.load import DataLoader
from fastai.learner import Learner
from torch import Tensor, nn

from ..cache.code import library
from ..outside.torch import written_times
from ..prefix import Cut

_WHOLE = 1 << 20  # bytes of an array that are looked at whole; NumPy does not count writes
_SAMPLED = 1 << 14  # numbers of a larger one
_WHOLE_TENSOR, _SAMPLED_TENSOR = 1 << 16, 1 << 8  # torch counts them
# Those that NumPy reads without a copy.
_OF_NUMPY = {torch.float32, torch.float64, torch.int64, torch.int32, torch.uint8, torch.bool}
_DEEPEST = 12
_FILES = 4096  # paths in one list of which each is asked when it was changed
_SIMPLE = (bool, int, float, complex, str, bytes, type(None))
# Their state changes with each reading.
_OF_READING = {"do", "idx", "rng", "orig_sz", "final_sz", "tl", "cp_size", "pcts", "split_idx"}
_OF_MODULES = frozenset(vars(nn.Module())) | {"training"}


@dataclass(frozen=True)
class Stamp:
    """The data of a learner and the attributes of its frozen part, and how often the weights there were written into.

    Writes may leave weights what they were: a new count is a reason to look, not to compute anew.
    """

    known: list
    writes: list


def stamp_of(learn: Learner, cut: Cut) -> Stamp:
    """The stamp of the data of a learner and of the modules before the cut."""
    walk, writes = _Walk(), []
    for dl in learn.dls.loaders[:2]:
        walk.add(_of_loader(dl))
    for module in cut.modules.values():
        for m in module.modules():
            walk.module(m)
        for t in (*module.parameters(), *module.buffers()):
            writes += [id(t), written_times(t), t.data_ptr() if t.layout == torch.strided and not t.is_meta else 0]
    return Stamp(walk.found, writes)


def _of_loader(dl) -> list:
    names = ["after_item", "before_batch", "after_batch", "collate_fn", "create_item", "create_batch", "n"]
    own = [vars(dl).get(name) for name in names] if isinstance(dl, DataLoader) else [dl.collate_fn]
    return [dl.dataset, own]


class _Walk:
    def __init__(self) -> None:
        self.found: list = []
        self._seen: dict[int, object] = {}

    def add(self, value, depth: int = 0) -> None:
        """Add a value and what is in it."""
        if isinstance(value, _SIMPLE):
            self.found.append(value)
            return
        # Most of a data set are tensors, so this is the way that costs.
        if type(value) is Tensor and id(value) not in self._seen:
            self._seen[id(value)] = value
            self.found += _of_tensor(value)
            return
        if id(value) in self._seen or depth > _DEEPEST:
            # Lists and dictionaries so deep may be made here, and be others the next time.
            self.found.append(len(value) if isinstance(value, list | dict) else id(value))
            return
        self._seen[id(value)] = value
        self.found.append(type(value))
        for part in self._parts(value):
            self.add(part, depth + 1)

    def module(self, m: nn.Module) -> None:
        """Add what a module computes by besides its weights: its own attributes and code."""
        self.add({k: v for k, v in vars(m).items() if not _apart(k, v)})
        self.add(type(m).forward)

    def _parts(self, value) -> list:
        if isinstance(value, Tensor):
            return _of_tensor(value)
        if isinstance(value, np.ndarray):
            return _of_array(value)
        if isinstance(value, pd.DataFrame | pd.Series | pd.Index):
            return _of_table(value)
        if isinstance(value, list | tuple):
            return [len(value), *value]
        if isinstance(value, dict):
            return [len(value), *(x for pair in value.items() for x in pair)]
        if isinstance(value, set | frozenset):
            return sorted(map(repr, value))
        if isinstance(value, PurePath):
            return [str(value), _changed(value)]
        if isinstance(value, FunctionType):
            return _of_function(value)
        if isinstance(value, MethodType):
            return [value.__func__, value.__self__]
        if isinstance(value, partial):
            return [value.func, value.args, value.keywords]
        return self._of_object(value)

    def _of_object(self, value) -> list:
        if isinstance(value, type | ModuleType | BuiltinFunctionType | nn.Module | torch.Generator):
            return [id(value), *(_own_class(value) if isinstance(value, type) else [])]
        kind = type(value)
        if kind.__module__.partition(".")[0] in ("plum", "random", "logging", "threading"):
            return [id(value)]
        attributes = {k: v for k, v in (getattr(value, "__dict__", None) or {}).items() if k not in _OF_READING}
        slots = [getattr(value, s, None) for c in kind.__mro__ for s in _slots(c)]
        inside = list(value) if isinstance(value, list | tuple) else []
        tobytes = getattr(value, "tobytes", None)
        size = getattr(value, "size", None)
        picture = (
            [zlib.crc32(tobytes())] if callable(tobytes) and isinstance(size, tuple) and _area(size) < _WHOLE else []
        )
        return [id(value), attributes, slots, inside, picture, *_own_class(kind)]


def _apart(name: str, value) -> bool:
    """Whether an attribute of a module is no part of what it computes when frozen: noise is held off, or muted by its rate."""
    return name in _OF_MODULES or "drop" in name or isinstance(value, nn.Module)


def _area(size: tuple) -> int:
    return 4 * size[0] * size[1] if len(size) == 2 else _WHOLE


def _slots(c: type) -> tuple:
    slots = vars(c).get("__slots__", ())
    return () if isinstance(slots, str) or c.__module__ == "builtins" else tuple(s for s in slots if s != "__weakref__")


def _own_class(c: type) -> list:
    """Attributes and methods of a class of the user's."""
    if library(c.__module__) is not None:
        return []
    kinds = (*_SIMPLE, FunctionType, Tensor, np.ndarray, list, dict)
    return [v for k, v in sorted(vars(c).items()) if isinstance(v, kinds) and k != "__doc__"]


def _of_function(f: FunctionType) -> list:
    cells = [c.cell_contents for c in f.__closure__ or () if _filled(c)]
    parts = [id(f.__code__), f.__defaults__, f.__kwdefaults__, cells]
    if library(f.__module__) is None:
        names = [n for code in _codes(f.__code__) for n in code.co_names]
        parts += [
            f.__globals__[n] for n in names if n in f.__globals__ and not isinstance(f.__globals__[n], ModuleType)
        ]
    return parts


def _filled(cell) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True


def _codes(code) -> list:
    return [code, *(c for const in code.co_consts if hasattr(const, "co_names") for c in _codes(const))]


def _of_tensor(t: Tensor) -> list:
    if isinstance(t, nn.Parameter):
        return [id(t)]
    about = [id(t), t.shape, written_times(t)]
    if type(t) is Tensor and t.dtype in _OF_NUMPY and t.device.type == "cpu" and t.layout == torch.strided:
        if t.is_contiguous() and t.numel() and not (t.requires_grad or t.is_neg()):
            numbers = t.numpy()
            if numbers.nbytes <= _WHOLE_TENSOR:
                return [*about, zlib.crc32(numbers.data)]
    if t.is_meta or t.layout != torch.strided or t.is_quantized or t.device.type != "cpu":
        return about
    t = t.detach().as_subclass(Tensor)
    if t.numel() * t.element_size() > _WHOLE_TENSOR:
        t = t.flatten()[:: max(1, t.numel() // _SAMPLED_TENSOR)] if t.is_contiguous() else t[: max(1, len(t) // 64)]
    return [*about, zlib.crc32(t.contiguous().view(-1).view(torch.uint8).numpy().data) if t.numel() else 0]


def _of_array(a: np.ndarray) -> list:
    about = [id(a), a.shape, str(a.dtype)]
    if a.dtype == object:
        return [*about, a.tolist()]
    if a.nbytes > _WHOLE:
        a = a.reshape(-1)[:: max(1, a.size // _SAMPLED)] if a.flags.c_contiguous else a[: max(1, len(a) // 64)]
    return [*about, zlib.crc32(np.ascontiguousarray(a).view(np.uint8).data) if a.size and not a.dtype.hasobject else 0]


def _of_table(t: pd.DataFrame | pd.Series | pd.Index) -> list:
    columns = [t[c] for c in t] if isinstance(t, pd.DataFrame) else [t]
    return [list(t.columns) if isinstance(t, pd.DataFrame) else None, *(c.to_numpy() for c in columns)]


def _changed(path: PurePath) -> tuple:
    try:
        stat = os.stat(path)
    except OSError:
        return ()
    return stat.st_mtime_ns, stat.st_size, stat.st_ino
