"""The state of an optimizer, with the names of its parameters: fastai saves it by position alone."""

from __future__ import annotations

from collections.abc import Mapping

from fastai.learner import Learner
from fastai.optimizer import Lookahead, OptimWrapper
from torch import Tensor

from ..modules import unwrap
from .plain import plain


def param_names(learn: Learner) -> list[list[str]]:
    """The name of each parameter in each list of the optimizer; one that the model does not have goes by its place."""
    name_of = {id(p): n for n, p in unwrap(learn.model).named_parameters()}
    lists = enumerate(learn.opt.param_lists)
    return [[name_of.get(id(p), f"optimizer.{i}.{j}") for j, p in enumerate(ps)] for i, ps in lists]


def opt_state(learn: Learner) -> dict:
    """State and hyper-parameters of the learner's optimizer, with the names of its parameters."""
    opt, outer = learn.opt, {}
    while isinstance(opt, Lookahead):
        outer = {"count": opt.count, "slow_weights": plain(opt.slow_weights)}
        opt = opt.opt
    if isinstance(opt, OptimWrapper):
        own = plain(opt.opt.state_dict())
    else:
        own = {
            "state": [plain(opt.state.get(p, {})) for ps in opt.param_lists for p in ps],
            "hypers": plain(opt.hypers),
        }
    return {"kind": _kind(learn.opt), "names": param_names(learn), "frozen_idx": opt.frozen_idx, "own": own, **outer}


def load_opt(learn: Learner, state: Mapping) -> None:
    """Give the learner's optimizer what `opt_state` returned, in place; call `check_optimizer` first."""
    opt, own = learn.opt, state["own"]
    while isinstance(opt, Lookahead):
        opt.count, slow = state["count"], state["slow_weights"]
        to = zip(opt.param_lists, slow or [], strict=bool(slow))
        opt.slow_weights = slow and [[s.to(p.device, copy=True) for s, p in zip(ss, ps, strict=True)] for ps, ss in to]
        opt = opt.opt
    opt.frozen_idx = state["frozen_idx"]
    if isinstance(opt, OptimWrapper):
        opt.opt.load_state_dict(own)
        return
    for hypers, saved in zip(opt.hypers, own["hypers"], strict=True):
        hypers.clear()
        hypers.update(saved)
    params = [p for ps in opt.param_lists for p in ps]
    for p, saved in zip(params, own["state"], strict=True):
        opt.state[p] = {k: v.to(p.device, copy=True) if isinstance(v, Tensor) else v for k, v in saved.items()}


def check_optimizer(learn: Learner, state: Mapping) -> None:
    """Raise ValueError where the learner's optimizer is of another kind than that of `opt_state`, or in another order."""
    if _kind(learn.opt) != state["kind"]:
        raise ValueError(f"the optimizer is {_kind(learn.opt)}, and the checkpoint's was {state['kind']}")
    here, there = param_names(learn), state["names"]
    if len(here) != len(there):
        raise ValueError(
            f"the optimizer has {len(here)} parameter groups and the checkpoint {len(there)}: "
            "they were made with different splitters"
        )
    for i, (names, saved) in enumerate(zip(here, there, strict=True)):
        if names != saved:
            odd = sorted({*names} ^ {*saved}) or [a for a, b in zip(names, saved, strict=True) if a != b]
            raise ValueError(
                f"parameter group {i} of the optimizer differs from the checkpoint's in {', '.join(odd[:3])}: "
                "they were made with different splitters"
            )


def _kind(opt) -> str:
    """What makes the state mean what it means: torch's class, or the steps of fastai's optimizer."""
    if isinstance(opt, Lookahead):
        return f"Lookahead({_kind(opt.opt)})"
    if isinstance(opt, OptimWrapper):
        return f"torch's {type(opt.opt).__name__}"
    return f"fastai's {', '.join(getattr(cb, 'func', cb).__name__ for cb in opt.cbs)}"
