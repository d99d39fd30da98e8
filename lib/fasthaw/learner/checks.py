"""The arguments that `transfer_learner` hands on: fastai says nothing of a wrong one before a fit, or nothing at all."""

from __future__ import annotations

import math
from collections.abc import Sequence

from fastai.learner import Metric
from fastai.torch_core import L

from ..words import a_path, flag, number, shown, wanted


def check_handed_on(
    *,
    loss_func: object,
    opt_func: object,
    lr: object,
    splitter: object,
    metrics: object,
    path: object,
    model_dir: object,
    wd: object,
    wd_bn_bias: object,
    train_bn: object,
    moms: object,
) -> None:
    """Raise TypeError or ValueError for the first that a `Learner` has no use for."""
    several = metrics if isinstance(metrics, list | tuple | L) else [] if metrics is None else [metrics]
    called = [("opt_func", opt_func), ("splitter", splitter), *(("a metric", m) for m in several)]
    for name, value in called if loss_func is None else [("loss_func", loss_func), *called]:
        if not callable(value) and not isinstance(value, Metric):
            raise TypeError(f"{name} is a function; {shown(value)} came")
    flag(wd_bn_bias, "wd_bn_bias")
    flag(train_bn, "train_bn")
    if not isinstance(lr, slice):
        number(lr, "lr is the rate that a fit has where it names none, a number or a slice")
    if wd is not None:
        number(wd, "wd is the weight decay of the optimizer")
    if path is not None:
        a_path(path, "path is where the learner writes")
    a_path(model_dir, "model_dir is where the learner keeps models")
    what = "moms are three momenta, such as (0.95, 0.85, 0.95)"
    three = wanted((list, tuple), moms, what)
    if len(three) != 3:
        raise ValueError(f"{what}; {shown(moms)} came")
    for mom in three:
        number(mom, f"{what}; each is")


def check_statistics(normalize: object, n_in: int) -> None:
    """Raise TypeError or ValueError for what is no flag and no mean and deviation with a number a channel, or one for all."""
    if isinstance(normalize, bool):
        return
    what = "normalize is True, False or (mean, std), each with one number a channel"
    if not isinstance(normalize, list | tuple) or len(normalize) != 2:
        raise TypeError(f"{what}; {shown(normalize)} came")
    for values in (v.tolist() if hasattr(v, "tolist") else v for v in normalize):
        if not isinstance(values, list | tuple) or not values:
            raise TypeError(f"{what}; {shown(normalize)} came")
        for value in values:
            number(value, what, least=-math.inf)
        if len(values) not in (1, n_in):
            raise ValueError(f"{what}; there are {n_in} channels, and {shown(normalize)} came")


def a_range(y_range: object) -> tuple[float, float]:
    """The two ends of `y_range`, the lower one first; raises TypeError or ValueError for anything else."""
    what = "y_range is the lowest and the highest output, such as (0, 5)"
    ends: Sequence = wanted((list, tuple), y_range, what)
    if len(ends) != 2:
        raise ValueError(f"{what}; {shown(y_range)} came")
    low, high = (number(y, f"{what}; each is", least=-math.inf) for y in ends)
    if low >= high:
        raise ValueError(f"{what}; {shown(y_range)} came")
    return low, high
