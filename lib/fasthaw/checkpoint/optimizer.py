"""The state of an optimizer, with the names of its parameters: fastai saves it by position alone."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from fastai.learner import Learner
from fastai.optimizer import Lookahead, OptimWrapper
from torch import Tensor

from ..modules import unwrap
from ..optimizer_state import inner
from .plain import plain_values


def param_names(learn: Learner) -> list[list[str]]:
    """The name of each parameter in each list of the optimizer; one that the model does not have goes by its place."""
    name_of = {id(p): n for n, p in unwrap(learn.model).named_parameters()}
    lists = enumerate(learn.opt.param_lists)
    return [[name_of.get(id(p), f"optimizer.{i}.{j}") for j, p in enumerate(ps)] for i, ps in lists]


def opt_state(learn: Learner) -> dict:
    """State and hyper-parameters of the learner's optimizer, with the names of its parameters."""
    opt, outer = learn.opt, {}
    while isinstance(opt, Lookahead):
        outer = {"count": opt.count, "slow_weights": plain_values(opt.slow_weights)}
        opt = opt.opt
    if isinstance(opt, OptimWrapper):
        own = plain_values(opt.opt.state_dict())
    else:
        own = {
            "state": [plain_values(opt.state.get(p, {})) for ps in opt.param_lists for p in ps],
            "hypers": plain_values(opt.hypers),
        }
    return {"kind": _meaning(learn.opt), "names": param_names(learn), "frozen_idx": opt.frozen_idx, "own": own, **outer}


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


def has_trained(opt) -> bool:
    """Whether an optimizer has the state of a step for any parameter."""
    return any(isinstance(v, Tensor) for kept in inner(opt).state.values() for v in kept.values())


def check_optimizer(learn: Learner, state: Mapping) -> None:
    """Raise ValueError where the learner's optimizer is of another kind than that of `opt_state`, or in another order."""
    if _meaning(learn.opt) != state["kind"]:
        raise ValueError(f"the optimizer is {_meaning(learn.opt)}, and the checkpoint's was {state['kind']}")
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
    opt = learn.opt
    while isinstance(opt, Lookahead):
        for name, p, slow in _aligned(opt, here, state["slow_weights"] or []):
            _check_shape("the slow weight", name, p, {"": slow})
        opt = opt.opt
    if isinstance(opt, OptimWrapper):
        _check_torch(opt.opt, here, state["own"])
    else:
        _check_fastai(opt, here, state["own"])


def _check_fastai(opt, names: list[list[str]], own: Mapping) -> None:
    params = [p for ps in opt.param_lists for p in ps]
    if len(own["state"]) != len(params) or len(own["hypers"]) != len(opt.hypers):
        raise ValueError(
            f"the checkpoint holds the optimizer's state of {len(own['state'])} parameters and {len(own['hypers'])} groups; "
            f"here are {len(params)} and {len(opt.hypers)}"
        )
    for i, (hypers, saved) in enumerate(zip(opt.hypers, own["hypers"], strict=True)):
        if odd := sorted(hypers.keys() ^ saved.keys()):
            raise ValueError(
                f"group {i} of the optimizer has the settings {', '.join(hypers)}, and the checkpoint's {', '.join(saved)}: "
                f"they differ in {', '.join(odd)}"
            )
    for name, p, saved in zip((n for ns in names for n in ns), params, own["state"], strict=True):
        _check_shape("the optimizer's state", name, p, saved)


def _check_torch(opt: torch.optim.Optimizer, names: list[list[str]], own: Mapping) -> None:
    sizes, saved = [len(g["params"]) for g in opt.param_groups], [len(g["params"]) for g in own["param_groups"]]
    if sizes != saved:
        raise ValueError(f"the torch optimizer's groups have {sizes} parameters, and the checkpoint's {saved}")
    params = [p for g in opt.param_groups for p in g["params"]]
    if odd := own["state"].keys() - set(range(len(params))):
        raise ValueError(
            f"the checkpoint holds the optimizer's state of parameters that do not exist: {sorted(odd)[:3]}"
        )
    flat = [n for ns in names for n in ns]
    for i, kept in own["state"].items():
        _check_shape("the optimizer's state", flat[i], params[i], kept)


def _check_shape(what: str, name: str, p: Tensor, saved: Mapping) -> None:
    """A tensor with as many dimensions as its parameter has that shape, or 1 in places (Adafactor)."""
    for key, t in saved.items():
        same = isinstance(t, Tensor) and t.dim() == p.dim() and t.dim()
        if same and any(a not in (1, b) for a, b in zip(t.shape, p.shape, strict=True)):
            raise ValueError(
                f"{what} of {name} is {f'{key} ' if key else ''}{tuple(t.shape)} in the checkpoint, and the parameter "
                f"{tuple(p.shape)} here"
            )


def _aligned(opt: Lookahead, names: list[list[str]], slow: list) -> list[tuple[str, Tensor, Tensor]]:
    sizes = [len(ss) for ss in slow]
    if slow and sizes != [len(ps) for ps in opt.param_lists]:
        raise ValueError(
            f"the checkpoint holds slow weights for groups of {sizes} parameters, which are not those here"
        )
    rows = zip(names, opt.param_lists, slow, strict=False)
    return [row for group in rows for row in zip(*group, strict=True)]


def _meaning(opt) -> str:
    """What makes the state mean what it means: torch's class, or the steps of fastai's optimizer."""
    if isinstance(opt, Lookahead):
        return f"Lookahead({_meaning(opt.opt)})"
    if isinstance(opt, OptimWrapper):
        return f"torch's {type(opt.opt).__name__}"
    return f"fastai's {', '.join(getattr(cb, 'func', cb).__name__ for cb in opt.cbs)}"
