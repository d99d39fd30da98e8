"""`lr_find` for layer groups: one multiplier is swept over a rate policy, so that the ratios between groups stay."""

from __future__ import annotations

import re
from collections import namedtuple
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from fastai.callback.core import CancelFitException, CancelValidException
from fastai.callback.schedule import ParamScheduler, valley
from fastai.learner import AvgSmoothLoss, Learner
from matplotlib.figure import Figure

from ..checkpoint import put_back, snapshot
from ..modules import unwrap
from ..rates import Computed, Flat, Geometric, LayerDecay, PerGroup, Rate, RateLike, as_rate
from ..report.plots import GREY, as_image, figure
from ..tables import as_html, as_text, wrapped
from ..undo import Undone
from ..untouched import Network
from ..words import at_least, flag, number, shown, wanted
from .learner_rates import lrs
from .processes import on_any_backend, processes_of


@dataclass(frozen=True, eq=False)
class Sweep:
    """The losses of a sweep, and the rates that the suggestion functions chose, each a policy to train with.

    `highest` is the largest rate of any group at each step, `chosen` the one of each suggestion. `suggested.valley` keeps
    the ratios of the policy that was swept.
    """

    rate: Rate
    highest: np.ndarray
    losses: np.ndarray
    chosen: tuple[float, ...]
    suggested: Any  # a named tuple: a policy for each function

    def __str__(self) -> str:
        return f"{as_text(*self._cells())}\n{wrapped(self.summary())}"

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return as_html(*self._cells(), below=[self.summary()]) + as_image(
            self.plot(), "the loss over the learning rate"
        )

    def summary(self) -> str:
        """What was swept."""
        span = f"{self.highest[0]:.1e} to {self.highest[-1]:.1e}"
        return f"{len(self.losses)} steps over {_rounded(self.rate)}, the rate of the fastest group from {span}."

    def plot(self) -> Figure:
        """The smoothed loss over the rate of the fastest group, with the suggestions."""
        with figure(figsize=(6, 3.5)) as (fig, ax):
            ax.plot(self.highest, self.losses, color=GREY)
            for name, at in zip(self.suggested._fields, self.chosen, strict=True):
                ax.plot(at, np.interp(at, self.highest, self.losses), "o", label=f"{name}: {at:.2g}")
            ax.set(xscale="log", xlabel="learning rate of the fastest group", ylabel="loss (smoothed)")
            ax.legend()
            ax.grid(alpha=0.3)
        return fig

    def _cells(self) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        each = zip(self.suggested._fields, self.chosen, self.suggested, strict=True)
        return ("suggested by", "highest rate", "policy"), [
            (name, f"{at:.2g}", _rounded(rate)) for name, at, rate in each
        ]


def lr_find(
    learn: Learner,
    rate: RateLike,
    *,
    start_lr: float = 1e-7,
    end_lr: float = 10.0,
    num_it: int = 100,
    stop_div: bool = True,
    suggest_funcs: Callable | Sequence[Callable] = (valley,),
) -> Sweep:
    """Train with ever larger multiples of `rate`, suggest multiples that train well, and undo all of it.

    fastai's `lr_find` gives every group one rate. Here the groups keep the ratios of `rate`, and it is the fastest one that
    goes from `start_lr` to `end_lr` in `num_it` batches. `stop_div` ends the sweep when the loss is four times its best.
    `suggest_funcs` are fastai's `valley`, `slide`, `minimum` and `steep`, or one of them. Weights, buffers, gradients,
    optimizer state, rates, random states and modes are put back, after an interruption too.

    Returns:
        `highest`, the largest rate of any group, and `losses`, arrays `(steps,)`; `suggested`, a policy for each function.

    Raises:
        ValueError: a rate that `lrs` refuses, rates out of order, or a loss that was good for too few steps.
    """
    wanted(Learner, learn, "lr_find takes a fastai Learner and a rate")
    number(start_lr, "start_lr is the rate that a sweep begins with")
    number(end_lr, "end_lr is the rate that a sweep ends with")
    num_it = at_least(10, num_it, "num_it is how many steps a sweep has")
    flag(stop_div, "stop_div")
    funcs = [suggest_funcs] if callable(suggest_funcs) else suggest_funcs
    if not isinstance(funcs, list | tuple) or not all(callable(f) and hasattr(f, "__name__") for f in funcs):
        raise TypeError(f"suggest_funcs are functions such as fastai's valley and slide; {shown(suggest_funcs)} came")
    if not 0 < start_lr < end_lr:
        raise ValueError(f"a sweep goes from a small rate to a larger one; start_lr={start_lr}, end_lr={end_lr} came")
    rate, rates = as_rate(rate), lrs(learn, rate)
    sweep = _Sweep([r / max(rates) for r in rates], start_lr, end_lr, num_it, stop_div)
    with undone(learn), on_any_backend(learn), learn.no_logging(), learn.no_mbar():
        learn.fit(num_it // len(learn.dls.train) + 1, cbs=sweep)
    highest, losses = torch.tensor(sweep.highest), torch.tensor(sweep.losses)
    inner = slice(num_it // 10, -5)  # as in fastai: the first losses are not smooth yet, the last diverge
    if len(losses[inner]) < 5:
        raise ValueError(
            f"the loss was good for {len(losses)} of {num_it} steps only; begin lower than start_lr={start_lr}"
        )
    chosen = tuple(float(f(highest[inner], losses[inner], num_it)[0]) for f in funcs)
    suggested = _suggested([f.__name__ for f in funcs], [times(rate, at / max(rates)) for at in chosen])
    return Sweep(rate, highest.numpy(), losses.numpy(), chosen, suggested)


def _suggested(names: Sequence[str], rates: Sequence[Rate]) -> Any:
    """`rates` by name, as fastai's `lr_find` has its suggestions; a class made on the spot says itself how it is pickled."""
    make: Any = namedtuple  # of names that a type checker cannot know
    kind = make("Suggested", names)
    kind.__reduce__ = lambda self: (_suggested, (list(self._fields), list(self)))
    return kind(*rates)


def _rounded(rate: Rate) -> str:
    """The policy as it is written, with three digits of each number: 1/2.6 has sixteen."""
    return re.sub(r"\d+\.\d{4,}(e-?\d+)?", lambda found: f"{float(found[0]):.3g}", repr(rate))


def times(rate: Rate, factor: float) -> Rate:
    """The policy with every rate multiplied by `factor`.

    >>> times(LayerDecay(1e-3, decay=0.5), 4)
    LayerDecay(lr=0.004, decay=0.5, floor=0.0)
    """
    if isinstance(rate, Geometric):
        return Geometric(rate.lo * factor, rate.hi * factor)
    if isinstance(rate, LayerDecay):
        return replace(rate, lr=rate.lr * factor, floor=rate.floor * factor)
    if isinstance(rate, PerGroup):
        return PerGroup(*(lr * factor for lr in rate.lrs))
    if isinstance(rate, Computed):
        return replace(rate, factor=rate.factor * factor)
    return Flat(rate.lr * factor, rate.body_div)


class _Sweep(ParamScheduler):
    """Multiplies `ratios` by a rate that grows from step to step; keeps the smoothed losses."""

    # Other callbacks know by this name of fastai's that the fit will be undone, and save nothing.
    name = "lr_finder"

    def __init__(self, ratios: Sequence[float], start: float, end: float, num_it: int, stop_div: bool) -> None:
        super().__init__({"lr": self._rates})
        self.ratios, self.start, self.end, self.num_it, self.stop_div = ratios, start, end, num_it, stop_div
        self.highest: list[float] = []
        self.losses: list[float] = []
        self._smooth = AvgSmoothLoss()
        self._smooth.reset()

    def _rates(self, position: float) -> list[float]:
        top = self.start * (self.end / self.start) ** position
        return [r * top for r in self.ratios]

    def before_batch(self) -> None:
        self._update_val(self.train_iter / self.num_it)

    def after_batch(self) -> None:
        self._smooth.accumulate(self.learn)
        loss = processes_of(self.learn).mean_of(float(self._smooth.value))
        if not np.isfinite(loss):
            raise CancelFitException
        self.highest.append(self.start * (self.end / self.start) ** ((self.train_iter - 1) / self.num_it))
        self.losses.append(loss)
        diverged = self.stop_div and loss > 4 * min(self.losses)
        if diverged or self.train_iter >= self.num_it:
            raise CancelFitException

    def before_validate(self) -> None:
        raise CancelValidException

    def after_fit(self) -> None:
        """Leave the recorder's schedule as it was."""


def undone(learn: Learner) -> Undone:
    """A block that puts back what training changes, however it ends: network, optimizer, learner, its list of callbacks.

    What callbacks keep is theirs: a cache that the sweep filled serves the fit after it.
    """
    state, network = snapshot(learn), Network(unwrap(learn.model))
    attributes, cbs = dict(vars(learn)), list(learn.cbs)

    def back() -> None:
        vars(learn).clear()
        vars(learn).update(attributes)
        learn.cbs.items[:] = cbs
        network.put_back()
        put_back(learn, state)

    return Undone(lambda: None, back)
