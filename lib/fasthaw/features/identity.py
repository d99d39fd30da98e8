"""Who a cache belongs to: a digest of data, transforms and settings that is the same in another process.

Paths count with the size and time of their file, arrays and tensors with all their bytes, functions with their code. What
fastai's random transforms remember of their last draw does not count.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Iterable, Mapping
from functools import partial
from inspect import isroutine, signature
from pathlib import Path
from types import CodeType, MethodType, ModuleType

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

_PLAIN = (
    *(type(None), bool, int, float, complex, str, bytes, range, slice, re.Pattern, frozenset, set),
    *(torch.dtype, torch.device, np.dtype, np.generic),
)
# Their state is not who they are.
_BY_TYPE = (random.Random, np.random.Generator, np.random.RandomState, torch.Generator)


def identity(*values) -> str:
    """A digest of `values`, 32 hexadecimal digits.

    Raises:
        TypeError: an object that has neither attributes nor a known kind, so that nothing tells two of them apart.

    >>> identity([1, 2]) == identity([1, 2]), identity([1, 2]) == identity([1, 3])
    (True, False)
    """
    digest = hashlib.blake2b(digest_size=16)
    _feed(digest, values, {})
    return digest.hexdigest()


def _feed(digest, value, seen: dict[int, tuple[int, object]]) -> None:
    """Add `value`; an object that was met before is told by when, so that cycles end."""
    if isinstance(value, memoryview):
        digest.update(value)
        return
    digest.update(f"<{type(value).__module__}.{type(value).__qualname__}>".encode())
    if isinstance(value, _PLAIN):
        digest.update((repr(sorted(map(repr, value))) if isinstance(value, set | frozenset) else repr(value)).encode())
    elif id(value) in seen:
        digest.update(str(seen[id(value)][0]).encode())
    elif not isinstance(value, _BY_TYPE):
        seen[id(value)] = len(seen), value  # kept alive, so that no other object gets its id
        for part in _parts(value):
            _feed(digest, part, seen)


def _parts(value) -> Iterable:
    """What tells `value` from others of its type."""
    if isinstance(value, Path):
        stat = value.stat() if value.is_file() else None
        return str(value), stat and (stat.st_size, stat.st_mtime_ns)
    if isinstance(value, Tensor):
        t = value.detach().cpu().as_subclass(Tensor).contiguous()
        return str(t.dtype), tuple(t.shape), memoryview(t.reshape(-1).view(torch.uint8).numpy())
    if isinstance(value, np.ndarray):
        if value.dtype == object:
            return list(value.reshape(-1))
        return value.dtype.str, value.shape, memoryview(np.ascontiguousarray(value).reshape(-1).view(np.uint8))
    if isinstance(value, pd.DataFrame | pd.Series | pd.Index):
        return pd.util.hash_pandas_object(value).to_numpy(), [str(c) for c in getattr(value, "columns", ())]
    if isinstance(value, Mapping):
        return [x for pair in value.items() for x in pair]
    if isinstance(value, list | tuple):
        return (len(value), *value)
    if isinstance(value, type | ModuleType):
        return (value.__module__, value.__qualname__) if isinstance(value, type) else (value.__name__,)
    return _parts_of_object(value)


def _parts_of_object(value) -> Iterable:
    if isinstance(value, CodeType):
        return value.co_code, value.co_names, [c for c in value.co_consts if isinstance(c, (*_PLAIN, CodeType, tuple))]
    if isinstance(value, partial):
        return value.func, value.args, value.keywords
    if isinstance(value, MethodType):
        return value.__func__, value.__self__
    dispatched = _dispatched_to(value)
    if dispatched is not None:
        return dispatched
    if isroutine(value):
        return _parts_of_function(value)
    if isinstance(value, nn.Module):
        return repr(value), dict(value.state_dict())
    if hasattr(value, "__array_interface__"):  # images
        return (np.asarray(value),)
    attributes = getattr(value, "__dict__", None)
    if attributes is None:
        raise TypeError(f"nothing tells one {type(value).__name__} from another")
    if any(c.__name__ == "RandTransform" for c in type(value).__mro__):
        given = {
            name for c in type(value).__mro__ if "__init__" in vars(c) for name in signature(c.__init__).parameters
        }
        attributes = {k: v for k, v in attributes.items() if k in given}
    return [x for name in sorted(attributes) if name != "__signature__" for x in (name, attributes[name])]


def _dispatched_to(value) -> list | None:
    """The functions that a transform of fastai chooses from by type: plum's, and fastcore's own before fastai 2.8."""
    if type(value).__name__ == "TypeDispatch":
        return [f for by_second in value.funcs.d.values() for f in by_second.d.values()] + list(value.bases)
    methods = getattr(value, "methods", ())
    return [m.implementation for m in methods if isroutine(getattr(m, "implementation", None))] or None


def _parts_of_function(f) -> Iterable:
    code = getattr(f, "__code__", None)
    if code is None:
        return getattr(f, "__module__", None), f.__qualname__
    cells = [c.cell_contents for c in f.__closure__ or ()]
    return f.__qualname__, code, f.__defaults__, cells, str(f.__annotations__)
