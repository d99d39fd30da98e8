"""What networks take and return, taken apart into leaves: lists, tuples and dictionaries, and objects that hold tensors."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ..outside.torch import TreeSpec, tree_flatten, tree_unflatten


@dataclass(frozen=True, eq=False)
class _Opened:
    """An object without its attributes that hold tensors, their names, and how leaves make each of them."""

    like: object
    names: tuple[str, ...]
    parts: tuple[Structure, ...]


@dataclass(frozen=True, eq=False)
class Structure:
    """How leaves make a value."""

    spec: TreeSpec
    opened: tuple[_Opened | None, ...]

    @property
    def n(self) -> int:
        """How many leaves there are."""
        return sum(1 if o is None else sum(p.n for p in o.parts) for o in self.opened)

    @property
    def is_leaf(self) -> bool:
        """Whether the value is its one leaf."""
        return self.spec.is_leaf() and self.opened == (None,)

    def build(self, leaves: Sequence):
        """The value that these leaves make."""
        given, outer = list(leaves), []
        for o in self.opened:
            if o is None:
                outer.append(given.pop(0))
                continue
            made = copy.copy(o.like)
            for name, part in zip(o.names, o.parts, strict=True):
                object.__setattr__(made, name, part.build([given.pop(0) for _ in range(part.n)]))
            outer.append(made)
        return tree_unflatten(outer, self.spec)

    def alike(self, other: Structure) -> bool:
        """Whether leaves of the one make a value of the other's kind."""
        return (
            self.spec == other.spec
            and len(self.opened) == len(other.opened)
            and all(_alike(a, b) for a, b in zip(self.opened, other.opened, strict=True))
        )


def _alike(a: _Opened | None, b: _Opened | None) -> bool:
    if a is None or b is None:
        return a is b
    same = type(a.like) is type(b.like) and a.names == b.names and vars(a.like) == vars(b.like)
    return same and all(x.alike(y) for x, y in zip(a.parts, b.parts, strict=True))


def flatten(value, depth: int = 3) -> tuple[list, Structure]:
    """The leaves of a value and how they make it; objects with tensors among their attributes are opened."""
    outer, spec = tree_flatten(value)
    leaves: list = []
    opened: list[_Opened | None] = []
    for x in outer:
        o = _opened(x, depth)
        opened.append(o)
        if o is None:
            leaves.append(x)
        else:
            for name in o.names:
                leaves += flatten(getattr(x, name), depth - 1)[0]
    return leaves, Structure(spec, tuple(opened))


def _opened(x, depth: int) -> _Opened | None:
    attributes = getattr(x, "__dict__", None)
    if not depth or isinstance(x, Tensor | type) or callable(x) or not isinstance(attributes, dict):
        return None
    held = {name: flatten(v, depth - 1) for name, v in attributes.items()}
    names = tuple(name for name, (leaves, _) in held.items() if any(isinstance(t, Tensor) for t in leaves))
    if not names:
        return None
    like = copy.copy(x)
    for name in names:
        object.__setattr__(like, name, None)
    return _Opened(like, names, tuple(held[name][1] for name in names))
