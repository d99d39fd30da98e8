"""What a rule says of a network: the groups, and which of them everything is in.

A rule is a function `rule(model, leaves, *args, **options) -> Division`, and a `Splitter` is a value that holds one. `leaves`
are the dotted names of the modules without children, in the order in which they run; the rule says of each the index of its
group. All else is derived by `groups.partition`, which checks it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from ..groups import SplitError
from ..words import shown, some_of


@dataclass(frozen=True)
class Doubt:
    """Modules that can be read otherwise: `new` is the head if they are new, `old` if they are pretrained."""

    names: tuple[str, ...]
    new: tuple[str, ...]
    old: tuple[str, ...]
    taken_for_new: bool


@dataclass(frozen=True)
class Division:
    """The `names` of the groups from the input to the head, and in `place` for every leaf module the index of its group.

    `params` says the same of parameters by themselves, by dotted name. Without a word a layer's parameters are in its group,
    those of a module that has children in the earliest that the module spans, or where their shape says so, in the last.
    `doubt` is for rules that take `head=`: what structure does not tell.

    >>> Division(["body", "head"], {"0": 0, "1": 0, "2": 1}).names
    ['body', 'head']
    """

    names: Sequence[str]
    place: Mapping[str, int]
    params: Mapping[str, int] = field(default_factory=dict)
    doubt: Doubt | None = None


Rule = Callable[..., Division]


def checked_division(division: object, model: nn.Module, leaves: Sequence[str], rule: str) -> Division:
    """What a rule returned; it may be anybody's.

    Raises:
        TypeError: it is no Division.
        SplitError: two groups have one name, a leaf module is in no group, or in one that there is not.
    """
    if not isinstance(division, Division):
        raise TypeError(f"the rule {rule} returns Division(names, place); {shown(division)} came")
    names, of = list(division.names), f"of {type(model).__name__}"
    if not names or any(not isinstance(n, str) or not n for n in names) or len(set(names)) < len(names):
        raise SplitError(f"the groups {of} have one name each, another for every group; {rule} names {shown(names)}")
    named = {*leaves, *(n for n, _ in model.named_parameters(remove_duplicate=False))}
    places = {**division.place, **division.params}
    if missed := [n for n in leaves if n not in division.place]:
        raise SplitError(f"{rule} puts {some_of(missed)} {of} in no group; Division.place has every name of `leaves`")
    if odd := [n for n, i in places.items() if n not in named or i not in range(len(names))]:
        where = f"a leaf module or parameter is in one of 0..{len(names) - 1}"
        raise SplitError(f"{rule} puts {odd[0]!r} {of} in group {places[odd[0]]!r}; {where}")
    return division
