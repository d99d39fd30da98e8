"""The ways to divide a network: each returns the names of the groups and, for every leaf module, its group's index.

A leaf is a module without children; `leaves` are their names in the order in which they run.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise

from torch import nn

from ..groups import SplitError
from ..modules import parent_name
from ..words import did_you_mean, some_of
from .names import readable, run_name
from .outline import Outline, outline
from .runs import evenly
from .stages import Cell
from .tree import Node

Places = tuple[list[str], dict[str, int]]


def by_stages(model: nn.Module, leaves: Sequence[str]) -> Places:
    """Stem, stages, head."""
    parts = outline(model, leaves)
    return _around(model, parts, [*([[parts.stem]] if parts.stem else []), *parts.stages], "stage")


def by_blocks(model: nn.Module, leaves: Sequence[str]) -> Places:
    """Stem, every block, head."""
    parts = outline(model, leaves)
    return _around(model, parts, [[cell] for cell in parts.cells], "block")


def by_even(model: nn.Module, leaves: Sequence[str], n: int) -> Places:
    """Runs of blocks of about equal size, head."""
    parts = outline(model, leaves)
    blocks, n_runs = parts.cells, n - bool(parts.head)
    if n_runs > len(blocks):
        has = f"{len(blocks)} blocks{' (one of them the stem)' * bool(parts.stem)}{' and a head' * bool(parts.head)}"
        raise SplitError(
            f"split_even({n}) is out of range: {type(model).__name__} has {has}; use 2..{len(blocks) + n - n_runs}"
        )
    return _around(model, parts, evenly(blocks, [c.size for c in blocks], n_runs), "part")


def by_at(model: nn.Module, leaves: Sequence[str], *boundaries: str) -> Places:
    """A group from each boundary to the next."""
    modules = dict(model.named_modules(remove_duplicate=False))
    position = {id(modules[n]): i for i, n in enumerate(leaves)}
    begins: dict[str, int] = {}
    for name in boundaries:
        if name not in modules:
            raise SplitError(f"{type(model).__name__} has no module {name!r}{_near(name, modules)}")
        if name in begins:
            raise SplitError(f"{name!r} is named twice as a boundary; name it once")
        begins[name] = min(position[id(m)] for m in modules[name].modules() if id(m) in position)
    _check_boundaries(begins)
    cuts = list(begins.values())
    place = {n: sum(cut <= i for cut in cuts) for i, n in enumerate(leaves)}
    if any(next(modules[n].parameters(), None) is not None for n in leaves[: cuts[0]]):
        return ["stem", *boundaries], place
    return list(boundaries), {n: max(i - 1, 0) for n, i in place.items()}


def by_by(model: nn.Module, leaves: Sequence[str], *patterns: tuple[str, str]) -> Places:
    """A group a pattern."""
    modules = dict(model.named_modules())
    claims = {leaf: _claims(leaf, patterns) for leaf in leaves}
    for leaf, groups in claims.items():
        if len(groups) > 1:
            both = " and ".join(f"{n}={p!r}" for n, p in patterns if n in groups)
            raise SplitError(f"{leaf} is claimed by {both}; let one of them match")
    for name, pattern in patterns:
        if not any(name in groups for groups in claims.values()):
            raise SplitError(
                f"{name}={pattern!r} matches no module of {type(model).__name__}; it must match a whole name, such as "
                f"{', '.join(n for n, _ in model.named_children())}"
            )
    missed = [n for n in leaves if not claims[n] and next(modules[n].parameters(), None) is not None]
    if missed:
        raise SplitError(
            f"no pattern matches {some_of(missed)}, which have parameters; let one of the patterns match them"
        )
    names = [n for n, _ in patterns]
    first = {n: next(i for i, leaf in enumerate(leaves) if n in claims[leaf]) for n in names}
    for a, b in pairwise(names):
        if first[a] > first[b]:
            raise SplitError(f"patterns out of order: {b!r} comes before {a!r} in the network; name it first")
    place, last = {}, 0
    for leaf in leaves:
        last = place[leaf] = names.index(claims[leaf][0]) if claims[leaf] else last
    return names, place


WAYS: dict[str, Callable[..., Places]] = {
    "stages": by_stages,
    "blocks": by_blocks,
    "even": by_even,
    "at": by_at,
    "by": by_by,
}


def _around(model: nn.Module, parts: Outline, runs: Sequence[Sequence[Cell]], plain: str) -> Places:
    """The runs of blocks under their names, and the head; an error where that leaves one group."""
    groups = [[leaf for cell in run for leaf in cell.leaves] for run in runs]
    names = _names(parts, runs, groups, plain)
    if parts.head:
        names, groups = [*names, "head"], [*groups, list(parts.head)]
    if len(groups) < 2:
        raise SplitError(
            f"found nothing to divide {type(model).__name__} by: its modules "
            f"({some_of([n for n, _ in model.named_children()]) or 'none'}) would be a single group. Name the modules that "
            "open a group: split_at('module', ...)"
        )
    return names, {leaf: i for i, leaves in enumerate(groups) for leaf in leaves}


def _names(parts: Outline, runs: Sequence[Sequence[Cell]], groups: Sequence[Sequence[str]], plain: str) -> list[str]:
    filled = _filled(parts.tree, groups)
    blocks = [[c.block.name for c in run if c is not parts.stem] for run in runs]
    alone = bool(blocks) and not blocks[0]
    taken = {"stem"} if alone else set()
    taken |= {"head"} if parts.head else set()
    names = [run_name(names, whole - taken) for names, whole in zip(blocks, filled, strict=True) if names]
    return ["stem"] * alone + readable(names, plain)


def _filled(whole: Node, groups: Sequence[Sequence[str]]) -> list[set[str]]:
    """For each group, the names of the modules all of whose leaves are in it."""
    place = {leaf: i for i, leaves in enumerate(groups) for leaf in leaves}
    filled: list[set[str]] = [set() for _ in groups]
    for node in whole.walk():
        inside = {place.get(leaf, -1) for leaf in node.leaves}
        if len(inside) == 1 and -1 not in inside and node.name:
            filled[inside.pop()].add(node.name)
    return filled


def _claims(name: str, patterns: Sequence[tuple[str, str]]) -> list[str]:
    """The groups whose pattern matches the module or one around it."""
    around = []
    while name:
        around.append(name)
        name = parent_name(name)
    return [group for group, pattern in patterns if any(re.fullmatch(pattern, n) for n in around)]


def _check_boundaries(begins: dict[str, int]) -> None:
    for (a, i), (b, j) in pairwise(begins.items()):
        if i == j:
            raise SplitError(f"{a!r} and {b!r} begin at the same layer, so the group {a!r} would be empty; name one")
        if i > j:
            right = ", ".join(map(repr, sorted(begins, key=begins.__getitem__)))
            raise SplitError(f"boundaries out of order: {b!r} comes before {a!r} in the network; use split_at({right})")


def _near(name: str, names: Iterable[str]) -> str:
    names = [n for n in names if n]
    called_so = [n for n in names if n.rpartition(".")[2] == name.rpartition(".")[2]][:3]
    if called_so:
        return f"; did you mean {' or '.join(map(repr, called_so))}?"
    return did_you_mean(name, names, 3) or f"; its parts are {', '.join(n for n in names if '.' not in n)}"
