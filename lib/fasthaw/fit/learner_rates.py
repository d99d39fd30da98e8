"""Rates for a learner: one float a layer group, checked against the groups before anything is trained."""

from __future__ import annotations

import warnings
from itertools import pairwise

from fastai.learner import Learner

from ..callbacks import grouped
from ..freezing import frozen
from ..groups import UNLISTED, LayerGroup
from ..pinned import wholly_pinned
from ..rates import RateLike, as_rate, check_trains, rates_for
from ..splitters import check_optimizer_groups, layer_groups
from ..words import wanted


def lrs(learn: Learner, rate: RateLike) -> list[float]:
    """One learning rate a layer group of `learn`, the head's last, for `learn.fit_one_cycle(n, lrs(learn, rate))`.

    A rate spans all groups, frozen ones included, so the same rate serves before and after an unfreezing. `slice(lo, hi)`
    means `Geometric(lo, hi)`, `slice(hi)` what it means in fastai, a number the same rate everywhere, a list one rate each.
    Groups that are wholly pinned are no depth for `LayerDecay`: the group before has the rate of the group after.

    Returns:
        `n_groups` rates, floats from 0 on, the group nearest the input first and the head's last.

    Raises:
        ValueError: a rate that is negative, not finite or of the wrong length, rates that are all zero where groups
            train, or an optimizer that was made with another splitter.
        SplitError: the groups do not cover the model exactly once.
    """
    wanted(Learner, learn, "lrs takes a fastai Learner and a rate")
    grouped(learn)
    check_optimizer_groups(learn, layer_groups(learn))
    groups = listed_groups(learn)
    rates = rates_for(as_rate(rate), [not wholly_pinned(g) for g in groups])
    check_trains([g.name for g in groups], [not f for f in frozen(groups)], rates)
    if any(a > b for a, b in pairwise(rates)):
        shown = ", ".join(f"{n} {r:.2g}" for n, r in zip([g.name for g in groups], rates, strict=True))
        warnings.warn(f"these rates fall towards the head: {shown}", stacklevel=2)
    return list(rates)


def listed_groups(learn: Learner) -> list[LayerGroup]:
    """The learner's layer groups that a fit can train: those in its optimizer."""
    return [g for g in layer_groups(learn) if g.name != UNLISTED]
