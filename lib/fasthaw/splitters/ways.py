"""The ways to divide a network: each returns the names of the groups and, for every leaf module, its group's index.

A leaf is a module without children; `leaves` are their names in the order in which they run.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise

from torch import nn

from ..groups import SplitError
from ..modules import hides_weights, parent_name
from ..words import did_you_mean, some_of
from .bare import bare_parameters
from .names import readable, run_name
from .newpart import Doubt
from .outline import Outline, outline
from .runs import evenly
from .stages import Cell
from .tree import Node

Places = tuple[list[str], dict[str, int], dict[str, int], Doubt | None]  # names, leaves, parameters, doubt


def by_stages(model: nn.Module, leaves: Sequence[str], head: Sequence[str] = ()) -> Places:
    """Stem, stages, head."""
    parts = outline(model, leaves, head)
    return _around(model, parts, [*([[parts.stem]] if parts.stem else []), *parts.stages], "stage")


def by_blocks(model: nn.Module, leaves: Sequence[str], head: Sequence[str] = ()) -> Places:
    """Stem, every block, head."""
    parts = outline(model, leaves, head)
    return _around(model, parts, [[cell] for cell in parts.cells], "block")


def by_even(model: nn.Module, leaves: Sequence[str], n: int, head: Sequence[str] = ()) -> Places:
    """Runs of blocks of about equal size, head."""
    parts = outline(model, leaves, head)
    blocks, n_runs = parts.cells, n - bool(parts.head or parts.found.bare)
    if n_runs > len(blocks):
        has = f"{len(blocks)} blocks{' (one of them the stem)' * bool(parts.stem)}{' and a head' * bool(parts.head)}"
        raise SplitError(
            f"split_even({n}) is out of range: {type(model).__name__} has {has}; use 2..{len(blocks) + n - n_runs}"
        )
    return _around(model, parts, evenly(blocks, [c.size for c in blocks], n_runs), "part")


def by_at(model: nn.Module, leaves: Sequence[str], *boundaries: str) -> Places:
    """A group from each boundary to the next; a bare parameter stands just before the boundary named after it, or last."""
    modules = dict(model.named_modules(remove_duplicate=False))
    bare = [n for _, n, _ in bare_parameters(model)]
    position = {id(modules[n]): i for i, n in enumerate(leaves)}
    begins: dict[str, int] = {}
    for name in boundaries:
        if name not in modules and name not in bare:
            raise SplitError(f"{type(model).__name__} has no module {name!r}{_near(name, [*modules, *bare])}")
        if name in begins:
            raise SplitError(f"{name!r} is named twice as a boundary; name it once")
        if name not in bare:
            begins[name] = min(position[id(m)] for m in modules[name].modules() if id(m) in position)
        else:
            begins[name] = -1
    _check_boundaries({n: i for n, i in begins.items() if n not in bare})
    nearest = len(leaves)
    for name in reversed(boundaries):
        nearest = begins[name] = nearest if name in bare else begins[name]
    cuts = list(begins.values())
    place = {n: sum(cut <= i for cut in cuts) for i, n in enumerate(leaves)}
    before = [modules[n] for n in leaves[: cuts[0]]]
    stem = any(next(m.parameters(), None) is not None for m in before)
    stem = stem or (len(boundaries) == 1 and any(map(hides_weights, before)))
    names = ["stem", *boundaries] if stem else list(boundaries)
    if len(names) < 2:
        raise SplitError(
            f"split_at({boundaries[0]!r}) makes one group of {type(model).__name__}, as nothing with parameters comes before "
            f"it; name where another begins, such as {_other_boundaries(model, leaves, cuts[0], bare)}"
        )
    if not stem:
        place = {n: max(i - 1, 0) for n, i in place.items()}
    return names, place, {n: names.index(n) for n in boundaries if n in bare}, None


def _other_boundaries(model: nn.Module, leaves: Sequence[str], at: int, bare: Iterable[str]) -> str:
    modules = dict(model.named_modules())
    later = [n for n in leaves[at + 1 :] if next(modules[n].parameters(), None) is not None]
    return some_of([repr(n) for n in [*bare, *reversed(later)]], 3) or "a module further on"


def by_by(model: nn.Module, leaves: Sequence[str], *patterns: tuple[str, str]) -> Places:
    """A group a pattern, over the names of modules and of bare parameters."""
    modules = dict(model.named_modules())
    bare = [n for _, n, _ in bare_parameters(model)]
    claims = {leaf: _claims(leaf, patterns) for leaf in [*leaves, *bare]}
    # What claims a container claims its bare parameters; one that names the parameter itself has the last word.
    for n in bare:
        claims[n] = [g for g, p in patterns if re.fullmatch(p, n)] or claims[n]
    for leaf, groups in claims.items():
        if len(groups) > 1:
            both = " and ".join(f"{n}={p!r}" for n, p in patterns if n in groups)
            raise SplitError(f"{leaf} is claimed by {both}; let one of them match")
    for name, pattern in patterns:
        if not any(name in groups for groups in claims.values()):
            raise SplitError(
                f"{name}={pattern!r} matches no module of {type(model).__name__}; it must match a whole name, such as "
                f"{', '.join([n for n, _ in model.named_children()] + [n for n in bare if '.' not in n])}"
            )
    missed = [n for n in leaves if not claims[n] and next(modules[n].parameters(), None) is not None]
    if missed:
        raise SplitError(
            f"no pattern matches {some_of(missed)}, which have parameters; let one of the patterns match them"
        )
    names = [n for n, _ in patterns]
    first = {n: next((i for i, leaf in enumerate(leaves) if n in claims[leaf]), None) for n in names}
    for a, b in pairwise([n for n in names if first[n] is not None]):
        if first[a] > first[b]:
            raise SplitError(f"patterns out of order: {b!r} comes before {a!r} in the network; name it first")
    place, last = {}, 0
    for leaf in leaves:
        last = place[leaf] = names.index(claims[leaf][0]) if claims[leaf] else last
    return names, place, {n: names.index(claims[n][0]) for n in bare if claims[n]}, None


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
    if parts.head or parts.found.bare:
        names, groups = [*names, "head"], [*groups, list(parts.head)]
    if len(groups) < 2:
        raise SplitError(
            f"found nothing to divide {type(model).__name__} by: its modules "
            f"({some_of([n for n, _ in model.named_children()]) or 'none'}) would be a single group. Name the modules that "
            "open a group: split_at('module', ...)"
        )
    bare = dict.fromkeys(parts.found.bare, len(groups) - 1)
    return names, {leaf: i for i, leaves in enumerate(groups) for leaf in leaves}, bare, parts.found.doubt


def _names(parts: Outline, runs: Sequence[Sequence[Cell]], groups: Sequence[Sequence[str]], plain: str) -> list[str]:
    filled = _filled(parts.tree, groups)
    blocks = [[c.block.name for c in run if c is not parts.stem] for run in runs]
    alone = bool(blocks) and not blocks[0]
    taken = {"stem"} if alone else set()
    taken |= {"head"} if parts.head or parts.found.bare else set()
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
