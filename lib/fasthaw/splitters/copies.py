"""Copies without grad inside a network: the EMA of an encoder, a momentum encoder, a teacher that is the student's twin.

Such a copy is neither a stage on the way from the input to the head nor a head, whatever its place among the children. So
the network is divided without it, and it becomes a group by itself before the last one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from torch import nn

from ..pinned import pinned_in
from .division import Division


def beside_copies(
    model: nn.Module, leaves: Sequence[str], divide: Callable[[nn.Module, Sequence[str]], Division]
) -> Division:
    """What `divide(model, leaves)` returns, with a group of its own for each copy; `leaves` name the leaf modules in order."""
    copies = copies_in(model)
    if not copies:
        return divide(model, leaves)
    inside = {n: c for n in leaves for c in copies if n == c or n.startswith(f"{c}.")}
    found = divide(_without(model, copies), [n for n in leaves if n not in inside])
    names, place, params = list(found.names), dict(found.place), dict(found.params)
    for one in copies:
        mine = [n for n in leaves if inside.get(n) == one]
        before = [place[n] + 1 for n in leaves[: leaves.index(mine[0])] if n in place]
        at = min(max(before, default=0), len(names) - 1)
        names.insert(at, one)
        place, params = ({n: i + (i >= at) for n, i in old.items()} for old in (place, params))
        place |= dict.fromkeys(mine, at)
    return replace(found, names=names, place=place, params=params)


def copies_in(model: nn.Module) -> list[str]:
    """The names of the children that are pinned whole, and like a child beside them of which something can train.

    Like: the same class, and parameters of the same names and shapes. Not in a `Sequential` or a list, whose children are
    steps one after the other, nor a single layer.
    """
    pinned, found = None, []
    for name, module in model.named_modules():
        kids = {n: c for n, c in module._modules.items() if c is not None and c._modules}
        if len(kids) < 2 or isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict):
            continue
        alike: dict[object, list[str]] = {}
        for n, kid in kids.items():
            alike.setdefault((type(kid), tuple((k, p.shape) for k, p in kid.named_parameters())), []).append(n)
        for group in (g for g in alike.values() if len(g) > 1):
            pinned = pinned_in(model) if pinned is None else pinned
            whole = [n for n in group if all(id(p) in pinned for p in kids[n].parameters())]
            if whole and len(whole) < len(group) and next(kids[whole[0]].parameters(), None) is not None:
                found += [f"{name}.{n}" if name else n for n in whole]
    return [n for n in found if not any(n.startswith(f"{other}.") for other in found)]


def _without(model: nn.Module, names: Sequence[str], at: str = "") -> nn.Module:
    """A view of the network without some of its modules: copies of the containers around them, with the same children."""
    view = copy.copy(model)
    kept: Mapping[str, nn.Module | None] = {
        n: m if m is None or not any(c.startswith(f"{at}{n}.") for c in names) else _without(m, names, f"{at}{n}.")
        for n, m in model._modules.items()
        if f"{at}{n}" not in names
    }
    vars(view)["_modules"] = dict(kept)
    return view
