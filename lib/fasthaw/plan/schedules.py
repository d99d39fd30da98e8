"""A schedule of finetuning-scheduler, read into a plan for the layer groups of a network.

There a phase lists the parameters that it thaws, by name or regular expression, and everything thawed before goes on training;
here a stage names the groups that train. So a group belongs to the phase that lists its parameters, and one whose parameters
are in two phases, or in one in part, is an error that names the parameter: no group is rounded up or down.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

from ..groups import LayerGroup
from ..pinned import pinned_names
from ..rates import PerGroup
from ..words import at_least, number, shown, some_of, wanted
from .plateau import Plateau
from .stages import Plan, Stage
from .written import read_yaml

_BASE_LR = 1e-5  # finetuning-scheduler's `base_max_lr`, for a phase without a rate
_KEYS = ("params", "max_transition_epoch", "lr")


def plan_of_schedule(
    source: Mapping | str | Path, groups: Sequence[LayerGroup], lr: float, epochs: int | None, until: Plateau | None
) -> Plan:
    """A stage a phase, each group at the rate of the phase that thaws it."""
    phases = _phases(source if isinstance(source, Mapping) else read_yaml(source))
    lr = number(lr, "lr is the rate of the first phase")
    if epochs is not None:
        at_least(1, epochs, "epochs is how long a phase without max_transition_epoch trains")
    listed = _listed(phases, [n for g in groups for n, _ in g.named_params()])
    phase_of = {g.name: _phase_of(g, listed) for g in groups}
    rates = [lr, *(number(p.get("lr", _BASE_LR), f"the lr of phase {i}") for i, p in enumerate(phases[1:], 1))]
    rate = PerGroup(*(lr if (i := phase_of[g.name]) is None else rates[i] for g in groups))
    stages, done = [], 0
    for i, phase in enumerate(phases):
        n = _epochs(i, phase, done, epochs)
        done += n
        names = tuple(g.name for g in groups if (at := phase_of[g.name]) is not None and at <= i)
        stages.append(Stage(n, rate, "all" if len(names) == len(groups) else names, f"phase {i}", until=until))
    return Plan(*stages)


def _phases(schedule: Mapping) -> list[Mapping[str, Any]]:
    if sorted(map(str, schedule)) != sorted(map(str, range(len(schedule)))):
        raise ValueError(f"a schedule has the phases 0, 1, 2, ...; {some_of(map(str, schedule))} came")
    phases = [schedule.get(i, schedule.get(str(i))) for i in range(len(schedule))]
    for i, phase in enumerate(phases):
        wanted(Mapping, phase, f"phase {i} of a schedule is a mapping with 'params'")
        odd = [k for k in phase if k not in _KEYS]
        if odd:
            raise ValueError(
                f"phase {i} of the schedule has {', '.join(map(shown, odd))}, which has no counterpart in a plan: take it "
                f"out. What is read is {', '.join(_KEYS)}"
            )
        params = phase.get("params")
        if not isinstance(params, list | tuple) or not params or not all(isinstance(p, str) for p in params):
            raise ValueError(
                f"the params of phase {i} are a list of names or regular expressions; {shown(params)} came"
            )
    return phases


def _epochs(i: int, phase: Mapping[str, Any], done: int, epochs: int | None) -> int:
    """How long the phase trains: its last epoch counts from the start of the whole run there, from its own start here."""
    until = phase.get("max_transition_epoch", -1)
    if isinstance(until, bool) or not isinstance(until, int):
        raise TypeError(f"the max_transition_epoch of phase {i} is a whole number; {shown(until)} came")
    if until >= 0:
        return max(until - done, 1)  # there, too, a phase that begins too late runs one epoch
    if epochs is None:
        raise ValueError(
            f"phase {i} of the schedule has no max_transition_epoch, so nothing says how long it trains: give epochs="
        )
    return epochs


def _phase_of(group: LayerGroup, listed: Mapping[str, list[int]]) -> int | None:
    """The phase that thaws the group; None for one that stays frozen. What is pinned trains in no phase."""
    pinned = set(pinned_names(group))
    found = {n: listed[n][0] if listed[n] else None for n, _ in group.named_params() if listed[n] or n not in pinned}
    several = dict.fromkeys(found.values())
    if len(several) > 1:
        first = {phase: next(n for n, p in found.items() if p == phase) for phase in several}
        parts = ", ".join(f"{n} in {'no phase' if p is None else f'phase {p}'}" for p, n in first.items())
        raise ValueError(
            f"the layer group {group.name} is cut in two by the schedule: {parts}. Give the network groups that end where "
            "its phases end: use_groups(learn, split_by(...)) or split_at(...)"
        )
    return next(iter(several), None)


def _listed(phases: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, list[int]]:
    """For each parameter the phase that lists it, in a list that is empty for one that none does."""
    listed: dict[str, list[int]] = {n: [] for n in names}
    for i, phase in enumerate(phases):
        for pattern in phase["params"]:
            for name in _matched(pattern, names, i):
                if i not in listed[name]:
                    listed[name].append(i)
    twice = next((n for n, at in listed.items() if len(at) > 1), None)
    if twice is not None:
        raise ValueError(f"{twice} is in the phases {', '.join(map(str, listed[twice]))} of the schedule; one thaws it")
    return listed


def _matched(pattern: str, names: Sequence[str], phase: int) -> list[str]:
    """The parameters that a phase lists so: by their names here, or else by those in the LightningModule, `model.` before."""
    attribute = "".join(takewhile(lambda c: c.isalnum() or c == "_", pattern))
    try:
        for before in ("", f"{attribute}."):
            found = [n for n in names if before + n == pattern] or [n for n in names if re.match(pattern, before + n)]
            if found:
                return found
    except re.error as error:
        raise ValueError(f"{pattern!r} in phase {phase} is no name and no regular expression: {error}") from None
    raise ValueError(
        f"{pattern!r} in phase {phase} of the schedule matches no parameter of this network; it has {some_of(names, 3)}"
    )
