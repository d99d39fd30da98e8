"""One optimizer seen through its wrappers: torch's, fastai's, or either inside `OptimWrapper`, `Lookahead` or accelerate's.

Wrappers are told by what they hold and not by their class, so that the layers which need torch alone can ask as well.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import Tensor, nn

from .modules import unwrap
from .outside.by_name import kept_on_clear


def inner(opt):
    """The optimizer that keeps the state: torch's own or fastai's, without what is wrapped around it."""
    *_, last = _through(opt)
    return last


def param_lists(opt) -> list[list[nn.Parameter]]:
    """The parameters of each group of the optimizer."""
    last = inner(opt)
    lists = vars(last).get("param_lists")
    return [list(ps) for ps in (lists if lists is not None else [g["params"] for g in last.param_groups])]


def state_of(opt, p: Tensor) -> dict:
    """What the optimizer remembers of a parameter's steps; empty where it begins afresh."""
    last = inner(opt)
    kept = kept_on_clear(last)
    return {k: v for k, v in last.state.get(p, {}).items() if k not in kept}


def forget(opt, params: Iterable[Tensor]) -> None:
    """Drop what the optimizer remembers of these parameters, in place; they start afresh when they train again.

    Fastai's keys `force_train` and `do_wd` stay, as in its own `clear_state`. Slow weights of `Lookahead` are copied from
    the live ones.
    """
    params = list(params)
    copy_slow(opt, params)
    last = inner(opt)
    kept = kept_on_clear(last)
    for p in params:
        if not kept:
            last.state.pop(p, None)
        elif p in last.state:
            # A fresh dict: after a load fastai's state is no defaultdict, so the entry must stay.
            last.state[p] = {k: v for k, v in last.state[p].items() if k in kept}


def copy_slow(opt, params: Iterable[Tensor]) -> None:
    """Give the slow weights of `Lookahead` the live values, in place: they would pull a frozen parameter back."""
    ids = {id(p) for p in params}
    for layer in _through(opt):
        slow_weights = vars(layer).get("slow_weights")
        for slow, fast in zip(slow_weights, layer.param_lists, strict=True) if slow_weights else ():
            for s, p in zip(slow, fast, strict=True):
                if id(p) in ids:
                    s.data.copy_(p.data)


def torn_apart(learn) -> bool:
    """Whether lists by hand (with decay and without) tear modules apart that the learner's own splitter leaves whole."""
    if hasattr(learn.splitter, "groups"):
        return False
    model = unwrap(learn.model)
    where = {id(p): i for i, ps in enumerate(param_lists(learn.opt)) for p in ps}
    made = list(learn.splitter(model))
    nested = made if made and not isinstance(made[0], Tensor) else [made]
    meant = {id(p): i for i, ps in enumerate(nested) for p in ps if isinstance(p, Tensor)}
    for module in model.modules():
        own = [id(p) for p in module._parameters.values() if p is not None and id(p) in meant and id(p) in where]
        if len({where[k] for k in own}) > 1 and len({meant[k] for k in own}) == 1:
            return True
    return False


def _through(opt) -> Iterator:
    """The optimizer and what it wraps, the outermost first."""
    while opt is not None:
        yield opt
        inside = vars(opt)
        opt = inside.get("opt", inside.get("optimizer"))
