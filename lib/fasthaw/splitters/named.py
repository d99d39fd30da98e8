"""Groups by name: `split_at` opens a group at each name, `split_by` makes one of what matches a pattern.

A name is that of a module or of any parameter. A parameter that is named by itself leaves its module: the layer's other
parameters stay, and the layer is in both groups, so whole in none. `groups.partition` refuses that for what has one state to
hold, such as a norm. A *bare* parameter, of a module with children, has no place in the order of layers.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import pairwise

from torch import nn

from ..groups import SplitError
from ..modules import hides_weights, parent_name
from ..words import did_you_mean, some_of
from .bare import bare_parameters, own_parameters
from .division import Division

_Position = tuple[int, int]  # of a leaf, and of a parameter in it


def at_names(model: nn.Module, leaves: Sequence[str], /, *boundaries: str) -> Division:
    """A group from each boundary to the next, in the order of layers and, in a layer, of its parameters.

    A bare parameter stands just before the boundary named after it, or last, and is alone in its group.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    position = {id(modules[n]): i for i, n in enumerate(leaves)}
    own = {n: (modules[parent_name(n)], i) for ns in own_parameters(modules).values() for i, n in enumerate(ns)}
    begins: dict[str, _Position] = {}
    for name in boundaries:
        if name not in modules and name not in own:
            raise SplitError(f"{type(model).__name__} has no module {name!r}{_near(name, modules, own)}")
        if boundaries.count(name) > 1:
            raise SplitError(f"{name!r} is named twice as a boundary; name it once")
        if name in modules:
            begins[name] = min(position[id(m)] for m in modules[name].modules() if id(m) in position), 0
        elif id(own[name][0]) in position:
            begins[name] = position[id(own[name][0])], own[name][1]
    _check_boundaries(begins)
    cuts = [(len(leaves), 0)]
    for name in reversed(boundaries):
        cuts.insert(0, begins.get(name, cuts[0]))
    first, inside = cuts[0]
    before = [modules[n] for n in leaves[:first]]
    stem = inside > 0 or any(next(m.parameters(), None) is not None for m in before)
    stem = stem or (len(boundaries) == 1 and any(map(hides_weights, before)))
    names = ["stem", *boundaries] if stem else list(boundaries)
    if len(names) < 2:
        later = [n for n in leaves[first + 1 :] if next(modules[n].parameters(), None) is not None]
        others = some_of([repr(n) for n in [*(n for _, n, _ in bare_parameters(model)), *reversed(later)]], 3)
        raise SplitError(
            f"split_at({boundaries[0]!r}) makes one group of {type(model).__name__}, as nothing with parameters comes before "
            f"it; name where another begins, such as {others or 'a module further on'}"
        )

    def group_at(*at: int) -> int:
        return max(sum(cut <= at for cut in cuts[:-1]) - (not stem), 0)

    place = {n: group_at(i, 0) for i, n in enumerate(leaves)}
    params = {n: group_at(position[id(owner)], i) for n, (owner, i) in own.items() if id(owner) in position and i}
    params = {n: i for n, i in params.items() if i != place.get(parent_name(n), i)}
    return Division(names, place, params | {n: names.index(n) for n in boundaries if n not in begins})


def by_patterns(model: nn.Module, leaves: Sequence[str], /, **patterns: str) -> Division:
    """A group a pattern, over the names of modules and of parameters."""
    modules = dict(model.named_modules())
    mine = own_parameters(modules)
    claims = {leaf: _claims(leaf, patterns) for leaf in leaves}
    broad = [g for g, pattern in patterns.items() if any(n and re.fullmatch(pattern, n) for n in modules)]
    for owner, params in mine.items():
        around = _claims(owner, patterns)
        vague = broad if around and not modules[owner]._modules else []
        claims |= {n: _claims_itself(n, params, patterns, vague) or around for n in params}
    for n, groups in claims.items():
        if len(groups) > 1:
            both = " and ".join(f"{g}={patterns[g]!r}" for g in groups)
            raise SplitError(f"{n} is claimed by {both}; let one of them match")
    claimed = {g for groups in claims.values() for g in groups}
    for name, pattern in patterns.items():
        if name not in claimed:
            bare = [n for n in mine.get("", []) if modules[""]._modules]
            raise SplitError(
                f"{name}={pattern!r} matches no module of {type(model).__name__}; it must match a whole name, such as "
                f"{', '.join([n for n, _ in model.named_children()] + bare)}"
            )
    lost = {leaf: [n for n in mine.get(leaf, []) if not claims[n]] for leaf in leaves}
    if missed := [n for leaf, ns in lost.items() for n in ([leaf] if ns == mine.get(leaf) else ns)]:
        raise SplitError(
            f"no pattern matches {some_of(missed)}, which have parameters; let one of the patterns match them"
        )
    steps = [g for leaf in leaves for n in [leaf, *mine.get(leaf, [])] for g in claims[n]]
    for a, b in pairwise([n for n in patterns if n in steps]):
        if steps.index(a) > steps.index(b):
            raise SplitError(f"patterns out of order: {b!r} comes before {a!r} in the network; name it first")
    names, place, last = list(patterns), {}, 0
    for leaf in leaves:
        at = [names.index(g) for n in [leaf, *mine.get(leaf, [])] for g in claims[n]]
        place[leaf] = at[0] if at else last
        last = max(at, default=last)
    return Division(names, place, {n: names.index(g) for ns in mine.values() for n in ns for g in claims[n]})


def _claims(name: str, patterns: Mapping[str, str]) -> list[str]:
    """The groups whose pattern matches the module or one around it."""
    around = []
    while name:
        around.append(name)
        name = parent_name(name)
    return [group for group, pattern in patterns.items() if any(re.fullmatch(pattern, n) for n in around)]


def _claims_itself(name: str, beside: Sequence[str], patterns: Mapping[str, str], vague: Collection[str]) -> list[str]:
    """The groups whose pattern is about a parameter's own name; `beside` are all parameters of its module.

    1. Such a pattern has the last word over what claims the module, so that `bias="fc.bias"` takes it out of `head="fc"`.
    2. But one meant for modules matches parameters by accident, as the first of `split_by(body="(?!fc$).*", head="fc")`
       matches `fc.weight` and `fc.bias`. It gives itself away: it matches modules (`vague`), and all that the layer has.
    """
    said = [g for g, pattern in patterns.items() if re.fullmatch(pattern, name)]
    return [g for g in said if g not in vague or not all(re.fullmatch(patterns[g], n) for n in beside)]


def _check_boundaries(begins: Mapping[str, _Position]) -> None:
    for (a, i), (b, j) in pairwise(begins.items()):
        if i == j:
            raise SplitError(f"{a!r} and {b!r} begin at the same layer, so the group {a!r} would be empty; name one")
        if i > j:
            right = ", ".join(map(repr, sorted(begins, key=begins.__getitem__)))
            raise SplitError(f"boundaries out of order: {b!r} comes before {a!r} in the network; use split_at({right})")


def _near(name: str, modules: Iterable[str], params: Iterable[str]) -> str:
    names = [n for n in modules if n]
    called_so = [n for n in names if n.rpartition(".")[2] == name.rpartition(".")[2]][:3]
    if called_so:
        return f"; did you mean {' or '.join(map(repr, called_so))}?"
    names += params
    return did_you_mean(name, names, 3) or f"; its parts are {', '.join(n for n in names if '.' not in n)}"
