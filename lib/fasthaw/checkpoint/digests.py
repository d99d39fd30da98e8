"""What an object is, as a table of dotted names: the same in every process, and cheap for data of any size.

Data is not read through a data set's `__getitem__`, which would decode it and may draw random numbers or count: what the
object keeps is looked at instead, its paths, labels, tables, tensors, transforms, and the code of its own classes and
functions. What is small counts whole, what is large by a spread sample. Paths count from the directory that they share,
so data that was moved is the same data. Random generators, GPUs and open files are not what an object is.
"""

from __future__ import annotations

import hashlib
import os
import random
import re
import sys
import sysconfig
from collections.abc import Iterable, Mapping
from enum import Enum
from functools import lru_cache, partial
from inspect import isroutine
from pathlib import Path, PurePath
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

_PLAIN = (
    *(type(None), bool, int, float, complex, str, bytes, range, slice, re.Pattern, Enum),
    *(torch.dtype, np.dtype, np.generic, torch.Size),
)
_STATE = (random.Random, np.random.Generator, np.random.RandomState, torch.Generator, torch.device)
_LEAVES = (*_PLAIN, *_STATE, Tensor, np.ndarray, pd.DataFrame, pd.Series, pd.Index, PurePath, partial, type, ModuleType)
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
_OF_EVERY_CLASS = {
    *(
        "__module__",
        "__dict__",
        "__weakref__",
        "__doc__",
        "__annotations__",
        "__firstlineno__",
        "__static_attributes__",
    ),
    *("__abstractmethods__", "_abc_impl", "__slots__", "__orig_bases__", "__parameters__", "__signature__"),
}
# Where a list or table is longer, so many spread items stand for the rest: large tensors, and the content of files.
_LARGE_ITEMS, _FILES = 1024, 64
_SMALL, _WHOLE, _OF_A_FILE = 1 << 12, 1 << 26, 1 << 20  # bytes: of a label, of a tensor that counts whole, of a file
_FEW = 32  # a list of so many objects has a name for each
_LIBRARIES = tuple(sysconfig.get_paths()[k] for k in ("stdlib", "platstdlib", "purelib", "platlib"))


def described(named: Mapping[str, object]) -> dict[str, str]:
    """What each value is and keeps, `{dotted name: text}`: short values as they are, all else by digest."""
    look = _Look(_shared_directory(named.values()))
    for name, value in named.items():
        look.at(name, value)
    return look.found


def module_described(model: nn.Module) -> dict[str, str]:
    """Class, code and configuration of every module inside `model`, by name, but no weights."""
    look = _Look("")
    look.at_module("", model)
    return look.found


def digest_of(value: object) -> str:
    """One digest of all that `value` holds."""
    return _Look("").digest(value)


class _Look:
    """One look: what was found by name, and the digests of what was met."""

    def __init__(self, root: str) -> None:
        self.root = root
        self.found: dict[str, str] = {}
        self._met: dict[int, tuple[object, str]] = {}  # the object is kept alive, so that no other gets its id
        self._whole = self._files = True

    def at(self, name: str, value: object) -> None:
        if id(value) in self._met and not isinstance(value, _PLAIN):
            self.found[name] = self._met[id(value)][1]
        elif isinstance(value, nn.Module):
            self.at_module(name, value)
            self.found[f"{name}.tensors"] = self.digest(dict(value.state_dict()))
        elif _is_object(value):
            self._met[id(value)] = value, f"the same as {name}"
            self.found[name] = self._kind(type(value))
            for key, part in _attributes(value):
                self.at(f"{name}.{key}", part)
        elif isinstance(value, list | tuple) and len(value) <= _FEW and any(_is_object(v) for v in _as_kept(value)):
            for i, part in enumerate(_as_kept(value)):
                self.at(f"{name}[{i}]", part)
        elif isinstance(value, Mapping) and len(value) <= _FEW and any(_is_object(v) for v in value.values()):
            for key, part in value.items():
                self.at(f"{name}[{key!r}]", part)
        else:
            self.found[name] = self._text(value)

    def at_module(self, prefix: str, model: nn.Module) -> None:
        for name, module in model.named_modules(prefix=prefix):
            own = {k: v for k, v in vars(module).items() if k not in _OF_EVERY_MODULE and not isinstance(v, nn.Module)}
            self.found[name] = self._kind(type(module))
            if hooks := [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]:
                self.found[f"{name} (hooks)"] = self.digest([h for h in hooks if isroutine(h)])
            if type(module).__module__.startswith("torch.nn"):
                self.found[f"{name} (settings)"] = self.digest(own)
                continue
            for key, value in own.items():
                if not isinstance(value, Tensor):  # what it computes: a hidden state, a cache
                    self.at(f"{name}.{key}", value)

    def digest(self, value: object) -> str:
        """16 hexadecimal digits."""
        digest = hashlib.blake2b(digest_size=8)
        self._feed(digest, value)
        return digest.hexdigest()

    def _text(self, value: object) -> str:
        plain = isinstance(value, _PLAIN) or (isinstance(value, tuple) and all(isinstance(v, _PLAIN) for v in value))
        text = repr(self._relative(value) if isinstance(value, str) else value) if plain else ""
        is_file = isinstance(value, str) and os.path.isabs(value)
        return text if text and len(text) <= 60 and not is_file else self.digest(value)

    def _kind(self, cls: type) -> str:
        name = f"{cls.__module__}.{cls.__qualname__}"
        return name if is_library(cls.__module__) else f"{name} {self.digest(cls)}"

    def _relative(self, text: str) -> str:
        return text[len(self.root) :] if self.root and text.startswith(self.root) else text

    def _feed(self, digest, value: object) -> None:
        digest.update(f"<{type(value).__module__}.{type(value).__qualname__}>".encode())
        if isinstance(value, str | PurePath):
            self._feed_text(digest, str(value), isinstance(value, PurePath))
        elif isinstance(value, _PLAIN):
            digest.update(repr(value).encode())
        elif isinstance(value, _STATE):
            return
        elif isinstance(value, Tensor | np.ndarray):
            self._feed_array(digest, value)
        elif id(value) in self._met:
            digest.update(self._met[id(value)][1].encode())
        else:
            self._met[id(value)] = value, f"met {len(self._met)}"
            inner = hashlib.blake2b(digest_size=8)
            self._feed_parts(inner, value)
            if self._whole and self._files:
                self._met[id(value)] = value, inner.hexdigest()
            digest.update(inner.digest())

    def _feed_text(self, digest, text: str, is_path: bool) -> None:
        digest.update(self._relative(text).encode(errors="surrogatepass"))
        may_be = self._files and len(text) < 512 and "\0" not in text and (is_path or os.sep in text)
        if may_be and os.path.isfile(text) and os.access(text, os.R_OK):
            with open(text, "rb") as file:
                digest.update(f"{os.path.getsize(text)}".encode() + file.read(_OF_A_FILE))

    def _feed_array(self, digest, value: Tensor | np.ndarray) -> None:
        digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
        if isinstance(value, np.ndarray) and value.dtype == object:
            self._feed_list(digest, list(value.reshape(-1)))
            return
        if isinstance(value, Tensor) and (value.layout != torch.strided or value.is_meta or value.is_quantized):
            return
        n_bytes = value.nbytes if isinstance(value, np.ndarray) else value.numel() * value.element_size()
        if n_bytes > _SMALL and not self._whole:
            return
        if n_bytes > _WHOLE and len(value.shape):
            value = value[_spread(len(value), _LARGE_ITEMS)]
        if isinstance(value, Tensor):
            value = value.detach().cpu().as_subclass(Tensor).contiguous().reshape(-1).view(torch.uint8).numpy()
        digest.update(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)

    def _feed_list(self, digest, values: list | tuple) -> None:
        values = _as_kept(values)
        digest.update(f"{len(values)}".encode())
        kinds = {type(v) for v in values}
        if kinds <= {bool, int, float, type(None)} or (kinds == {str} and len(values) > _FILES):
            text = "\0".join(values if kinds == {str} else map(repr, values))
            digest.update((text.replace(self.root, "") if self.root else text).encode(errors="surrogatepass"))
            values = [values[i] for i in _spread(len(values), _FILES)] if kinds == {str} else ()
        whole, files, n = self._whole, self._files, len(values)
        large, read = set(_spread(n, _LARGE_ITEMS)), set(_spread(n, _FILES))
        try:
            for i, value in enumerate(values):
                self._whole, self._files = whole and i in large, files and i in read
                self._feed(digest, value)
        finally:
            self._whole, self._files = whole, files

    def _feed_parts(self, digest, value: object) -> None:
        if isinstance(value, list | tuple):
            self._feed_list(digest, value)
        elif isinstance(value, set | frozenset):
            digest.update("".join(sorted(self.digest(v) for v in value)).encode())
        elif isinstance(value, Mapping):
            self._feed_list(digest, [part for pair in value.items() for part in pair])
        elif isinstance(value, pd.DataFrame):
            self._feed_list(digest, [part for c in value.columns for part in (str(c), value[c].to_numpy())])
        elif isinstance(value, pd.Series | pd.Index):
            self._feed(digest, value.to_numpy())
        elif isinstance(value, ModuleType):
            digest.update(value.__name__.encode())
        elif isinstance(value, nn.Module):
            digest.update(repr(value).encode())
        elif hasattr(value, "__array_interface__"):  # images
            self._feed_array(digest, np.asarray(value))
        else:
            for part in self._code_parts(value):
                self._feed(digest, part)

    def _code_parts(self, value: object) -> Iterable:
        if isinstance(value, CodeType):
            return [value.co_code.hex(), value.co_names, [c for c in value.co_consts if not isinstance(c, frozenset)]]
        if isinstance(value, partial):
            return [value.func, value.args, value.keywords]
        if isinstance(value, MethodType):
            return [value.__func__, value.__self__]
        if isinstance(value, staticmethod | classmethod):
            return [value.__func__]
        if isinstance(value, property):
            return [value.fget, value.fset]
        if isinstance(value, FunctionType):
            return _parts_of_function(value)
        if isinstance(value, type):
            return _parts_of_class(value)
        if (by_type := _dispatched_to(value)) is not None:
            return by_type
        if isroutine(value):
            return [getattr(value, "__module__", None), value.__qualname__]
        return [type(value), *(part for pair in _attributes(value) for part in pair)]


def _parts_of_class(cls: type) -> list:
    if is_library(cls.__module__):
        return [cls.__module__, cls.__qualname__]
    own = sorted((k, v) for k, v in vars(cls).items() if k not in _OF_EVERY_CLASS and isinstance(k, str))
    return [cls.__qualname__, list(cls.__bases__), *(part for k, v in own for part in (k, _of_global(v)))]


def _parts_of_function(f: FunctionType) -> list:
    if is_library(f.__module__):
        return [f.__module__, f.__qualname__]
    cells = []
    for cell in f.__closure__ or ():
        try:
            cells.append(_of_global(cell.cell_contents))
        except ValueError:  # not set yet
            cells.append(None)
    used = [(n, _of_global(f.__globals__[n])) for n in sorted(_names(f.__code__)) if n in f.__globals__]
    return [f.__qualname__, f.__code__, f.__defaults__, f.__kwdefaults__, cells, used]


def _names(code: CodeType) -> set[str]:
    return {*code.co_names, *(n for c in code.co_consts if isinstance(c, CodeType) for n in _names(c))}


def _of_global(value: object, depth: int = 3) -> object:
    """What a function uses from outside: values, functions and classes, of any other object its type alone."""
    if isinstance(value, list | tuple | set | frozenset) and depth:
        return [_of_global(v, depth - 1) for v in value]
    if isinstance(value, dict) and depth:
        return {k: _of_global(v, depth - 1) for k, v in value.items()}
    simple = (*_PLAIN, Tensor, np.ndarray, PurePath, partial, type, ModuleType, staticmethod, classmethod, property)
    if isinstance(value, simple) or isroutine(value) or _dispatched_to(value) is not None:
        return value
    return f"{type(value).__module__}.{type(value).__qualname__}"


def _dispatched_to(value: Any) -> list | None:
    """The functions that a transform of fastai chooses from by type: plum's, and fastcore's own before fastai 2.8."""
    if type(value).__name__ == "TypeDispatch":
        return [f for by_second in value.funcs.d.values() for f in by_second.d.values()] + list(value.bases)
    if type(value).__module__.partition(".")[0] != "plum":
        return None
    found = [m.implementation for m in getattr(value, "methods", ()) if isroutine(getattr(m, "implementation", None))]
    return sorted(found, key=lambda f: (f.__qualname__, f.__code__.co_firstlineno)) or None


def _is_object(value: object) -> bool:
    """Whether it is worth a name for each of its attributes."""
    if isinstance(value, nn.Module):
        return True
    kinds = (*_LEAVES, list, tuple, dict, set, frozenset, CodeType)
    return (
        not isinstance(value, kinds)
        and not isroutine(value)
        and bool(_attributes(value))
        and (_dispatched_to(value) is None and not hasattr(value, "__array_interface__"))
    )


def _attributes(value: object) -> list[tuple[str, object]]:
    slots = {
        s: getattr(value, s)
        for c in type(value).__mro__
        for s in ([vars(c)["__slots__"]] if isinstance(vars(c).get("__slots__"), str) else vars(c).get("__slots__", ()))
        if not is_library(c.__module__) and hasattr(value, s) and s != "__dict__"
    }
    return sorted({**slots, **getattr(value, "__dict__", {})}.items(), key=lambda pair: str(pair[0]))


@lru_cache(maxsize=4096)
def is_library(module: str | None) -> bool:
    """Installed packages go by name: a run goes on where they were updated. `__main__` and a project's own files do not."""
    top = (module or "").partition(".")[0]
    if top == "__main__":
        return False
    if top in sys.stdlib_module_names or top == "fasthaw":
        return True
    file = getattr(sys.modules.get(module or ""), "__file__", None)
    return bool(file) and str(file).startswith(_LIBRARIES)


def _as_kept(values: list | tuple) -> list:
    """What a list holds: a data set may be a list whose own `[i]` decodes and draws random numbers."""
    return list(list.__iter__(values) if isinstance(values, list) else tuple.__iter__(values))


def _spread(n: int, most: int) -> list[int]:
    return list(range(n)) if n <= most else [i * (n - 1) // (most - 1) for i in range(most)]


def _shared_directory(values: Iterable) -> str:
    """The directory, with a separator, that the absolute paths in `values` share; empty where they share the root alone."""
    paths = [p for v in values for p in _paths_in(v, 6, set())]
    shared = os.path.commonpath([os.path.dirname(p) if not os.path.isdir(p) else p for p in paths]) if paths else ""
    return "" if len(shared) <= 1 else shared + os.sep


def _paths_in(value: object, depth: int, seen: set[int]) -> Iterable[str]:
    if isinstance(value, str | PurePath):
        text = str(value)
        if len(text) < 512 and os.path.isabs(text):
            yield text
        return
    if depth == 0 or id(value) in seen or isinstance(value, (*_PLAIN, *_STATE, Tensor, nn.Module, type, ModuleType)):
        return
    seen.add(id(value))
    if isinstance(value, pd.DataFrame):
        value = [value[c].to_numpy() for c in value.columns]
    if isinstance(value, np.ndarray):
        value = list(value.reshape(-1)[_spread(value.size, _FILES)]) if value.dtype == object else ()
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        kept = _as_kept(value)
        parts = [kept[i] for i in _spread(len(kept), _FILES)]
    else:
        parts = [] if isroutine(value) else [v for _, v in _attributes(value)]
    for part in parts:
        yield from _paths_in(part, depth - 1, seen)


def last_part(value: object) -> str:
    """The last part of a path, for a message; of anything else nothing."""
    return Path(value).name if isinstance(value, str | PurePath) else ""
