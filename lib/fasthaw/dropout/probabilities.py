"""Dropout probabilities over layer groups: a number, one a group by name, or a policy over depth."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from numbers import Real

from torch import nn

from ..groups import LayerGroup
from ..modules import parent_name
from ..rates import as_rate
from ..splitters import Splitter, layer_groups
from ..words import is_finite, names_of, shown, wanted

Probability = float | Mapping[str, float] | slice | Sequence[float] | Callable[[int], Sequence[float]]


def probabilities(
    of: object | nn.Module,
    names: Sequence[str],
    p: Probability,
    within: str | Sequence[str] | None,
    splitter: Splitter | None,
) -> dict[str, float]:
    """The probability for each of these module names; those outside `within`, or whose group has none, are left out.

    `of` is a network or a learner, whose own layer groups are asked for unless a splitter comes. A module that
    spans several groups counts to the last of them.

    Raises:
        ValueError: a probability outside [0, 1), an unknown group.
        TypeError: `p` is none of what `Probability` lists.
    """
    if splitter is not None:
        wanted(Splitter, splitter, "splitter says what the layer groups are, such as split_stages()")
    if within is not None:
        within = names_of(within, "within= is the name of a layer group, or several")
    if isinstance(p, Real) and within is None:
        return dict.fromkeys(names, checked(p))
    groups = layer_groups(of, splitter)
    by_group = _by_group(p, [g.name for g in groups])
    if within is not None:
        if isinstance(p, Mapping):
            raise ValueError("a mapping says by itself which layer groups get dropout; leave within= out")
        _check_known(within, [g.name for g in groups])
        by_group = {name: by_group[name] for name in within}
    group_of = last_group_of(groups)
    return {name: by_group[group_of[name]] for name in names if group_of[name] in by_group}


def last_group_of(groups: Sequence[LayerGroup]) -> dict[str, str]:
    """For each module, by its dotted name, the name of the last group with anything of it in it."""
    last: dict[str, str] = {}
    for group in groups:
        # A layer whose parameters are in two groups is among the modules of none.
        for name in (*group.modules, *(parent_name(n) for n, _ in group.named_params())):
            # Up to the first container that this group has reached already.
            while last.get(name) != group.name:
                last[name] = group.name
                name = parent_name(name)
    return last


def checked(p: object) -> float:
    """`p` as a plain float in [0, 1)."""
    if not isinstance(p, Real) or isinstance(p, bool):
        raise TypeError(f"a dropout probability is a number in [0, 1); got {shown(p)} ({type(p).__name__})")
    if not is_finite(p) or not 0 <= float(p) < 1:
        got = p if is_finite(p) else shown(p)
        raise ValueError(f"a dropout probability lies in [0, 1): at 1 nothing is left to train on; got {got}")
    return float(p)


def _by_group(p: Probability, names: list[str]) -> dict[str, float]:
    if isinstance(p, Real):
        return dict.fromkeys(names, checked(p))
    if isinstance(p, Mapping):
        _check_known(p, names)
        return {name: checked(value) for name, value in p.items()}
    if isinstance(p, bool | str | bytes) or not (callable(p) or isinstance(p, slice | Sequence)):
        raise TypeError(
            f"p is a number in [0, 1), {{group: number}} or a policy such as Geometric(0.05, 0.3); got {shown(p)}"
        )
    ps = tuple(p) if isinstance(p, Sequence) else as_rate(p)(len(names))
    if len(ps) != len(names):
        raise ValueError(f"{len(ps)} probabilities came for {len(names)} layer groups: {', '.join(names)}")
    return dict(zip(names, map(checked, ps), strict=True))


def _check_known(wanted, names: list[str]) -> None:
    unknown = [str(w) for w in wanted if w not in names]
    if unknown or not wanted:
        came = f"no layer group is called {', '.join(map(repr, unknown))}" if unknown else "no layer group is named"
        raise ValueError(f"{came}; the groups are {', '.join(names)}")
