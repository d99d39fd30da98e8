"""Python values as plain ones and back: numbers, texts, arrays, tensors, and containers of them.

Identity is kept. Two attributes that share a list share one again, and what belongs to the learner (its network, a
parameter, a loader) is written by name and found again, never copied: an average that walks over its own list of the
network's parameters would otherwise come back with parameters that nobody trains.
"""

from __future__ import annotations

import hashlib
from collections import Counter, OrderedDict, deque
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch
from fastai.torch_core import L
from torch import Tensor, nn

from ..outside.torch import Uninitialized, is_wrapper

_SCALARS = (type(None), bool, int, float, str)
_SEQUENCES = {"list": list, "L": L, "deque": deque, "set": set, "frozenset": frozenset, "tuple": tuple}
_MAPPINGS: dict[str, type] = {"dict": dict, "OrderedDict": OrderedDict, "Counter": Counter}
_KIND = {cls: kind for kind, cls in (*_SEQUENCES.items(), *_MAPPINGS.items())}
_DEEPEST = 50
_SMALLEST_ID = 1 << 20  # smaller whole numbers are no address, and so no `id()`


class NotPlain(TypeError):
    """A value that cannot be written; its text says of what type the part is that is no plain value."""


class ValueWriter:
    """Writes several values that may share parts. `own` are the learner's objects by name."""

    def __init__(self, own: Mapping[str, object]) -> None:
        self._names = {id(value): name for name, value in own.items()}
        # Whose memory begins where: `name` of the learner's tensors, `n` of those that were written; None where a part was.
        self._memory: dict[int, tuple[Tensor, dict] | None] = {
            place: (t, {"name": name}) for name, t in own.items() if isinstance(t, Tensor) and (place := _place(t))
        }
        self._met: dict[int, int] = {}
        self._alive: list[object] = []

    def write(self, value: object, depth: int = 0) -> Any:
        """`value` as what `torch.load(weights_only=True)` reads; tensors are not copied.

        Raises:
            NotPlain: a part of it is something else.
        """
        if id(value) in self._names:
            return {"is": "own", "name": self._names[id(value)]}
        if type(value) is int and value > _SMALLEST_ID and value in self._names:
            return {"is": "id", "name": self._names[value]}  # a dictionary by `id(p)`
        if type(value) in _SCALARS:
            return value
        if id(value) in self._met:
            return {"is": "again", "n": self._met[id(value)]}
        if depth > _DEEPEST:
            raise NotPlain(f"a {type(value).__name__} inside itself")
        if isinstance(value, Tensor):
            return self._tensor(value)
        if isinstance(value, np.ndarray | np.generic):
            return self._array(value)
        if (kind := _KIND.get(type(value))) is None:
            return _text(value)
        node: dict[str, Any] = {"is": kind}
        if kind not in ("tuple", "frozenset"):
            node["n"] = self._number(value)
        parts: Iterable = value  # type: ignore[assignment]
        if isinstance(value, Mapping):
            parts = (part for pair in value.items() for part in pair)
        node["of"] = [self.write(part, depth + 1) for part in parts]
        return {**node, "most": value.maxlen} if isinstance(value, deque) else node

    def _number(self, value: object) -> int:
        self._alive.append(value)  # so that nothing else gets its id
        return self._met.setdefault(id(value), len(self._met))

    def _tensor(self, t: Tensor) -> dict:
        if t.layout != torch.strided or t.is_quantized or t.is_meta or is_wrapper(t):
            raise NotPlain(f"a tensor of {t.layout} and {t.dtype} on {t.device}")
        place = _place(t)
        if place in self._memory:
            if (known := self._memory[place]) is None or known[0].dtype != t.dtype:
                raise NotPlain("a tensor that shares the memory of another one in part")
            return {"is": "view", **known[1], "as": [list(t.shape), list(t.stride()), t.storage_offset()]}
        of, whole = (
            t.detach().to("cpu").as_subclass(Tensor),
            t.untyped_storage().nbytes() == t.numel() * t.element_size(),
        )
        node = {"is": "tensor", "n": self._number(t), "of": of if whole else of.clone(), "device": t.device.type}
        if place:
            self._memory[place] = (t, {"n": node["n"]}) if whole else None
        return {**node, "param": isinstance(t, nn.Parameter), "grad": t.requires_grad and t.is_leaf}

    def _array(self, value: np.ndarray | np.generic) -> dict:
        if value.dtype.kind not in "biufcSUmM":
            raise NotPlain(f"an array of {value.dtype}")
        of = torch.frombuffer(bytearray(value.tobytes()), dtype=torch.uint8) if value.nbytes else torch.empty(0)
        node: dict[str, Any] = {"is": "number", "dtype": value.dtype.str, "of": of}
        if isinstance(value, np.ndarray):
            node |= {"is": "array", "n": self._number(value), "shape": list(value.shape)}
        return node


class ValueReader:
    """Reads what one `ValueWriter` wrote, with the same `own` names. Tensors of a GPU come to `device`."""

    def __init__(self, own: Mapping[str, object], device: torch.device) -> None:
        self.own, self.device = own, device
        self._met: dict[int, object] = {}
        self._used: set[int] = set()

    def read(self, node: Any, existing: object = None) -> Any:
        """The value; lists, sets and dictionaries in place of `existing`, where that is one of their kind.

        Raises:
            KeyError: the learner has no object of that name.
        """
        if not isinstance(node, dict):
            return node
        kind = node["is"]
        if kind == "again":
            return self._met[node["n"]]
        if kind == "view":
            whole: Any = self.own[node["name"]] if "name" in node else self._met[node["n"]]
            return whole.detach().as_strided(*node["as"])
        if kind in ("own", "id"):
            return self.own[node["name"]] if kind == "own" else id(self.own[node["name"]])
        if kind in ("list", "L", "deque", "set", *_MAPPINGS):
            return self._container(node, existing)
        if kind in ("tuple", "frozenset"):
            return _SEQUENCES[kind](self.read(part) for part in node["of"])
        value: Any
        if kind == "tensor":
            value = self._as_tensor(node)
        elif kind in ("array", "number"):
            array = np.frombuffer(node["of"].numpy().tobytes(), dtype=np.dtype(node["dtype"]))
            value = array.reshape(node["shape"]).copy() if kind == "array" else array[0]
        else:
            return _of_text(kind, node["of"])
        return value if kind == "number" else self._met.setdefault(node["n"], value)

    def _as_tensor(self, node: Mapping) -> Tensor:
        t = node["of"].to("cpu" if node["device"] == "cpu" else self.device, copy=True)
        return nn.Parameter(t, node["grad"]) if node["param"] else t.requires_grad_(node["grad"])

    def _container(self, node: Mapping, existing: object) -> object:
        kind = node["is"]
        cls = (_SEQUENCES | _MAPPINGS)[kind]
        # A list that somebody else reads as well stays the one that they read; one that is the learner's is not touched.
        free = id(existing) not in self._used and all(existing is not value for value in self.own.values())
        at: Any = existing if type(existing) is cls and free and kind != "deque" else None
        if at is None:
            at = deque(maxlen=node["most"]) if kind == "deque" else cls()
        self._used.add(id(at))
        self._met[node["n"]] = at
        parts = [self.read(part) for part in node["of"]]
        if kind == "L":
            at.items = parts
            return at
        at.clear()
        if kind in _MAPPINGS:
            at.update(dict(zip(parts[::2], parts[1::2], strict=True)))
        else:
            at.update(parts) if kind == "set" else at.extend(parts)
        return at


def digest_of_node(node: Any) -> bytes:
    """What two values written by a fresh `ValueWriter` each have in common exactly when they are equal, in any process."""
    digest = hashlib.blake2b(digest_size=16)
    if isinstance(node, Tensor):
        digest.update(f"{node.dtype}{tuple(node.shape)}".encode())
        if node.layout == torch.strided:
            digest.update(node.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return digest.digest()
    if isinstance(node, dict):
        parts = [digest_of_node(part) for pair in node.items() for part in pair]
        if node["is"] in ("set", "frozenset"):
            parts = sorted(digest_of_node(part) for part in node["of"])
    elif isinstance(node, list):
        parts = [digest_of_node(part) for part in node]
    else:
        parts = [repr(node).encode()]
    digest.update(type(node).__name__.encode())
    for part in parts:
        digest.update(len(part).to_bytes(8, "big") + part)
    return digest.digest()


def _place(t: Tensor) -> int:
    """Where a tensor's numbers begin in memory; 0 where it has none of its own."""
    if t.layout != torch.strided or t.is_meta or is_wrapper(t) or isinstance(t, Uninitialized) or not t.numel():
        return 0
    return t.untyped_storage().data_ptr()


def _text(value: object) -> dict:
    """Small values that a text stands for."""
    if isinstance(value, PurePath):
        return {"is": "path", "of": str(value)}
    if isinstance(value, torch.device | torch.dtype):
        return {"is": type(value).__name__, "of": str(value).removeprefix("torch.")}
    if type(value) is bytes:
        return {"is": "bytes", "of": value.hex()}
    if type(value) is complex:
        return {"is": "complex", "of": [value.real, value.imag]}
    if isinstance(value, torch.Size):
        return {"is": "Size", "of": list(value)}
    raise NotPlain(f"a {type(value).__qualname__}")


def _of_text(kind: str, of: Any) -> object:
    if kind == "path":
        return Path(of)
    if kind == "bytes":
        return bytes.fromhex(of)
    if kind == "complex":
        return complex(*of)
    if kind == "Size":
        return torch.Size(of)
    return torch.device(of) if kind == "device" else getattr(torch, of)
