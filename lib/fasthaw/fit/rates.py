"""Rates for a learner: one float a layer group, checked against the groups before anything is trained."""

from __future__ import annotations

import warnings
from itertools import pairwise

from fastai.learner import Learner

from ..freezing import frozen
from ..groups import UNLISTED
from ..rates import RateLike, as_rate, check_trains
from ..splitters import Splitter, layer_groups
from ..words import wanted


def lrs(learn: Learner, rate: RateLike) -> list[float]:
    """One learning rate a layer group of `learn`, the head's last, for `learn.fit_one_cycle(n, lrs(learn, rate))`.

    A rate spans all groups, frozen ones included, so the same rate serves before and after an unfreezing. `slice(lo, hi)`
    means `Geometric(lo, hi)`, `slice(hi)` what it means in fastai, a number the same rate everywhere, a list one rate each.

    Raises:
        ValueError: a rate that is negative, not finite or of the wrong length, rates that are all zero where groups
            train, or an optimizer that was made with another splitter.
        SplitError: the groups do not cover the model exactly once.
    """
    wanted(Learner, learn, "lrs takes a fastai Learner and a rate")
    groups = [g for g in layer_groups(learn) if g.name != UNLISTED]
    names = [g.name for g in groups]
    if learn.opt is not None and isinstance(learn.splitter, Splitter) and len(learn.opt.param_lists) != len(groups):
        raise ValueError(
            f"the optimizer has {len(learn.opt.param_lists)} parameter groups but {learn.splitter} makes {len(groups)} "
            f"({', '.join(names)}): it was made with another splitter or model. Call learn.create_opt()"
        )
    rates = as_rate(rate)(len(groups))
    check_trains(names, [not f for f in frozen(groups)], rates)
    if any(a > b for a, b in pairwise(rates)):
        shown = ", ".join(f"{n} {r:.2g}" for n, r in zip(names, rates, strict=True))
        warnings.warn(f"these rates fall towards the head: {shown}", stacklevel=2)
    return list(rates)
