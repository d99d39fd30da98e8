"""Who a cache belongs to: a digest of data, code and settings that is the same in another process.

Contents count and names do not stand for them: files with all their bytes, also those that a text names, alone or in a folder
that is met on the way; arrays and tensors with all their numbers; code with what it reads. What fastai's random transforms
remember of their last draw does not count. What nothing tells apart is an error, never a guess.
"""

from __future__ import annotations

import dis
import hashlib
import io
import logging
import os
import pickle
import random
import re
import stat
import threading
import weakref
from collections.abc import Iterable, Mapping
from functools import partial
from inspect import isroutine, signature
from pathlib import PurePath
from types import CodeType, FunctionType, MethodType, ModuleType

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from .code import Word, file_digest, parts_of_bound, parts_of_class, parts_of_code, parts_of_function, parts_of_module

_PLAIN = (
    *(type(None), type(...), type(NotImplemented), bool, int, float, complex, range, slice, bytearray),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size, np.dtype, np.generic),
)
# Their state is not who they are.
_BY_TYPE = (
    *(random.Random, np.random.Generator, np.random.RandomState, torch.Generator, logging.Logger, weakref.ref),
    *(type(threading.Lock()), type(threading.RLock())),
)
_BARE = frozenset(vars(nn.Module()))  # what every module has: its hooks, flags and dictionaries
_LONGEST = 1024  # a longer text is no path
_MOST = 16  # folders in which the files that texts name are looked for
_SUFFIX = re.compile(r"\.\w{1,8}")


def identity(*values) -> str:
    """A digest of `values`, 32 hexadecimal digits.

    Raises:
        TypeError: an object that has neither attributes nor a known kind, so that nothing tells two of them apart.

    >>> identity([1, 2]) == identity([1, 2]), identity([1, 2]) == identity([1, 3])
    (True, False)
    """
    return Walk().of(values)


class Walk:
    """One way through values: what was met, which texts may name files, and which files were read."""

    def __init__(self, opened: Iterable[str] = ()) -> None:
        self._digest = hashlib.blake2b(digest_size=16)
        self._seen: dict[int, tuple[int, object]] = {}
        self._texts: dict[str, None] = {}
        self._roots: dict[str, None] = {}
        self._suffixes: dict[str, None] = {"": None}
        self._opened = tuple(opened)
        self.files: set[str] = set()

    def of(self, values) -> str:
        """The digest of `values`.

        Raises:
            TypeError: nothing tells some object from others, or a file of `opened` is named by nothing in `values`.
        """
        try:
            self.feed(values)
        except RecursionError as e:
            raise TypeError("objects are nested too deeply to be told apart") from e
        self._files_in_folders()
        unknown = [p for p in self._opened if p not in self.files]
        if unknown:
            raise TypeError(f"items are read from files that nothing in the data set names ({unknown[0]})")
        return self._digest.hexdigest()

    def feed(self, value) -> None:
        """Add `value`; an object that was met before is told by when, so that cycles end."""
        kind = type(value)
        if kind is Word:
            self._add(b"w", value.encode())
        elif kind is str or isinstance(value, str):
            self._text(value)
        elif isinstance(value, memoryview):
            self._add(b"m", value)
        elif isinstance(value, bytes):
            self._add(b"b", value)
            self._file(value)
        elif isinstance(value, _PLAIN):
            self._add(b"p", f"{kind.__module__}.{kind.__qualname__} {value!r}".encode())
        elif isinstance(value, set | frozenset):
            # In the order of their digests: that of a set is another in each process.
            self._add(b"s", "".join(sorted(self._alone(v) for v in value)).encode())
        elif id(value) in self._seen:
            self._add(b"a", str(self._seen[id(value)][0]).encode())
        else:
            self._seen[id(value)] = len(self._seen), value  # kept alive, so that no other object gets its id
            self._object(value)

    def _object(self, value) -> None:
        if not isinstance(value, type):
            self.feed(type(value))
        if isinstance(value, _BY_TYPE):
            return
        self._add(b"(", b"")
        for part in _parts(value):
            if type(part) is np.ndarray and part.dtype.kind not in "OUS":
                self._array(part)
            else:
                self.feed(part)
        self._add(b")", b"")
        if isinstance(value, PurePath):
            self._file(str(value))

    def _array(self, a: np.ndarray) -> None:
        self._add(b"n", f"{a.dtype.str} {a.shape}".encode())
        self._add(b"m", np.ascontiguousarray(a).reshape(-1).view(np.uint8).data)

    def _alone(self, value) -> str:
        walk = Walk()
        walk.feed(value)
        self._texts |= walk._texts
        self._roots |= walk._roots
        self.files |= walk.files
        return walk._digest.hexdigest()

    def _add(self, kind: bytes, data) -> None:
        self._digest.update(kind + str(len(data)).encode() + b":")
        self._digest.update(data)

    def _text(self, text: str) -> None:
        self._add(b"t", text.encode("utf-8", "surrogatepass"))
        if _SUFFIX.fullmatch(text):
            self._suffixes[text] = None
        if text and len(text) <= _LONGEST and "\n" not in text and not self._file(text):
            self._texts[text] = None

    def _file(self, path: str | bytes) -> bool:
        """Add the content of the file that is named so; whether there is one."""
        if not path or len(path) > _LONGEST:
            return False
        try:
            mode = os.stat(path).st_mode
        except (OSError, ValueError):  # no such file, or no name of one
            return False
        name = os.fsdecode(path)
        if stat.S_ISDIR(mode):
            self._roots[name] = None
        elif stat.S_ISREG(mode):
            self._add(b"f", file_digest(name).encode())
            self.files.add(os.path.realpath(name))
            return True
        return False

    def _files_in_folders(self) -> None:
        """The files that a text names inside a folder, as a column of a table with file names does."""
        for path in self._opened:
            self._learn_from(path)
        if len(self._roots) > _MOST:
            return
        for root in self._roots:
            for text in self._texts:
                for suffix in self._suffixes:
                    name = os.path.join(root, text + suffix)
                    if name not in (root, root + os.sep):
                        self._file_only(name)

    def _file_only(self, name: str) -> None:
        if os.path.isfile(name):
            self._add(b"f", file_digest(name).encode())
            self.files.add(os.path.realpath(name))

    def _learn_from(self, path: str) -> None:
        """From a file that was opened: in which folder, and with which suffix, a text names files."""
        if path in self.files:
            return
        for root in PurePath(path).parents:
            rest = os.path.relpath(path, root)
            stem, suffix = os.path.splitext(rest)
            if rest in self._texts or stem in self._texts:
                self._roots[str(root)] = None
                self._suffixes["" if rest in self._texts else suffix] = None


def _parts(value) -> Iterable:
    """What tells `value` from others of its type."""
    if isinstance(value, PurePath):
        return (Word(value),)
    if isinstance(value, Tensor):
        return (*_parts_of_tensor(value), _more(value))
    if isinstance(value, np.ndarray):
        if value.dtype.kind in "OUS":
            items = [os.fsdecode(x) if isinstance(x, bytes) else x for x in value.reshape(-1).tolist()]
            return value.dtype.str, value.shape, items
        return (np.asarray(value),)
    if isinstance(value, pd.DataFrame | pd.Series | pd.Index):
        return _parts_of_table(value)
    if isinstance(value, re.Pattern):
        return value.pattern, value.flags
    if isinstance(value, Mapping):
        given = getattr(value, "default_factory", None)
        return (len(value), *(x for pair in value.items() for x in pair), given, _more(value))
    if isinstance(value, list | tuple):
        return (len(value), *value, _more(value))
    if isinstance(value, type):
        return parts_of_class(value)
    if isinstance(value, ModuleType):
        return parts_of_module(value)
    return _parts_of_object(value)


def _more(value) -> dict | None:
    """What a subclass of a list, a dictionary or a tensor holds besides."""
    held = getattr(value, "__dict__", None)
    return dict(sorted(held.items())) if held else None


def _parts_of_tensor(value: Tensor) -> tuple:
    t = value.detach() if type(value) in (Tensor, nn.Parameter) else value.detach().as_subclass(Tensor)
    if t.is_meta:
        raise TypeError("a tensor on the meta device holds no numbers")
    if t.layout != torch.strided:
        t = t.to_sparse_coo().coalesce()
        return tuple(t.shape), t.indices(), t.values()
    if t.is_quantized:
        return t.int_repr(), t.dequantize()
    t = t.resolve_conj().resolve_neg().cpu().contiguous()
    return str(t.dtype), tuple(t.shape), t.reshape(-1).view(torch.uint8).numpy().data


def _parts_of_table(value: pd.DataFrame | pd.Series | pd.Index) -> tuple:
    if isinstance(value, pd.DataFrame):
        return (list(value.columns), value.index, *(value.iloc[:, i] for i in range(value.shape[1])))
    kind, name = Word(value.dtype), value.name
    held: tuple
    if isinstance(value.dtype, pd.CategoricalDtype):
        held = (
            (value.cat.codes, value.cat.categories) if isinstance(value, pd.Series) else (value.codes, value.categories)
        )
    elif isinstance(value.dtype, np.dtype) and value.dtype.kind in "biufcmM":
        held = (value.to_numpy(),)
    else:
        held = (value.tolist(),)
    return (kind, name, *held, value.index) if isinstance(value, pd.Series) else (kind, name, *held)


def _parts_of_object(value) -> Iterable:
    if isinstance(value, CodeType):
        return parts_of_code(value)
    if isinstance(value, partial):
        return value.func, value.args, value.keywords, _more(value)
    if isinstance(value, MethodType):
        return parts_of_bound(value)
    dispatched = _dispatched_to(value)
    if dispatched is not None:
        return dispatched
    if isinstance(value, FunctionType):
        return parts_of_function(value)
    if isroutine(value) and not hasattr(value, "__dict__"):
        # Of `{"a": 1}.get` the dictionary counts.
        owner = getattr(value, "__self__", None)
        owner = None if isinstance(owner, ModuleType) else owner
        return Word(getattr(value, "__module__", None)), Word(value.__qualname__), owner
    if isinstance(value, nn.Module):
        return parts_of_network(value)
    if isinstance(value, io.IOBase):
        return _parts_of_open_file(value)
    if hasattr(value, "__array_interface__"):  # images
        return np.asarray(value), _more_of_image(value)
    return _attributes(value)


def _parts_of_open_file(value: io.IOBase) -> tuple:
    name = getattr(value, "name", None)
    if isinstance(value, io.BytesIO | io.StringIO):
        return (value.getvalue(),)
    if isinstance(name, str | bytes) and os.path.isfile(name):
        return (name,)
    raise TypeError(f"nothing tells one {type(value).__name__} from another")


def _more_of_image(value) -> tuple:
    return getattr(value, "mode", None), getattr(value, "palette", None) and bytes(value.palette.palette)


def parts_of_network(module: nn.Module, contents: bool = True) -> Iterable:
    """Attributes, buffers and modules of a network; its parameters with their numbers where `contents` is asked for."""
    given = {k: v for k, v in vars(module).items() if k not in _BARE}
    for name in sorted(given):
        yield Word(name)
        yield from _without_parameters(given[name]) if not contents else (given[name],)
    for name, p in module._parameters.items():
        yield Word(name)
        yield p if contents else p is not None and (str(p.dtype), tuple(p.shape))
    for name, b in module._buffers.items():
        yield Word(name)
        yield b if contents else b is not None and (str(b.dtype), tuple(b.shape))
    for name, m in module._modules.items():
        yield from (Word(name), m) if contents else (Word(name),)


def _without_parameters(value) -> Iterable:
    if isinstance(value, nn.Parameter):
        return (str(value.dtype), tuple(value.shape))
    if isinstance(value, nn.Module):  # known where it stands in the network
        return (type(value),)
    if isinstance(value, list | tuple) and any(isinstance(v, nn.Parameter | nn.Module) for v in value):
        return [x for v in value for x in _without_parameters(v)]
    return (value,)


def _attributes(value) -> Iterable:
    """What an object holds in attributes and slots; else what it would be pickled as."""
    attributes = dict(getattr(value, "__dict__", {}))
    if any(c.__name__ == "RandTransform" for c in type(value).__mro__):
        attributes = _without_draws(value, attributes)
    slots = {
        f"_{c.__name__.lstrip('_')}{s}" if s.startswith("__") and not s.endswith("__") else s
        for c in type(value).__mro__
        for s in _slots(c)
    }
    attributes |= {s: getattr(value, s) for s in slots if s not in ("__dict__", "__weakref__") and hasattr(value, s)}
    if attributes or hasattr(value, "__dict__"):
        held = [x for name in sorted(attributes) if name != "__signature__" for x in (Word(name), attributes[name])]
        return held if _is_whole(value) else [*held, *_pickled(value)]
    return _pickled(value)


def _slots(c: type) -> tuple[str, ...]:
    slots = vars(c).get("__slots__", ())
    return (slots,) if isinstance(slots, str) else tuple(slots)


def _is_whole(value) -> bool:
    """Whether all that an object holds is in its attributes: no class that is written in C is among its own."""
    return all(c is object or c.__flags__ & (1 << 9) for c in type(value).__mro__)


def _pickled(value) -> Iterable:
    try:
        reduced = value.__reduce_ex__(4)
    except (TypeError, pickle.PicklingError, RuntimeError) as e:  # RuntimeError: torch of what it compiled
        raise TypeError(f"nothing tells one {type(value).__name__} from another") from e
    if isinstance(reduced, str):
        return (Word(reduced),)
    f, args, *rest = reduced
    if not any(r is not None for r in rest) and args in ((), (type(value),)):
        raise TypeError(f"nothing tells one {type(value).__name__} from another")
    return (Word(f.__qualname__), args, *(list(r) if i and r is not None else r for i, r in enumerate(rest[:3])))


def _without_draws(value, attributes: dict) -> dict:
    """The attributes of one of fastai's random transforms but for those that its methods set from draw to draw."""
    made = ("__init__", "setup", "setups", "__post_init__")
    drawn, given = set(), set()
    for c in type(value).__mro__:
        if "__init__" in vars(c):
            given |= set(signature(vars(c)["__init__"]).parameters)
        for name, f in vars(c).items():
            if isinstance(f, FunctionType) and name not in made:
                drawn |= {i.argval for i in dis.get_instructions(f.__code__) if i.opname == "STORE_ATTR"}
    return {k: v for k, v in attributes.items() if k in given or k not in drawn}


def _dispatched_to(value) -> list | None:
    """The functions that a transform of fastai chooses from by type: plum's, and fastcore's own before fastai 2.8."""
    if type(value).__name__ == "TypeDispatch":
        return [f for by_second in value.funcs.d.values() for f in by_second.d.values()] + list(value.bases)
    if type(value).__module__.partition(".")[0] != "plum":
        return None
    methods = getattr(value, "methods", ())
    return [m.implementation for m in methods if isroutine(getattr(m, "implementation", None))] or None
