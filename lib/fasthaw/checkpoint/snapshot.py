"""What a resume needs: weights, buffers, gradients, optimizer state and random states of a learner.

Everything goes by name and is compared with the learner before a tensor is touched: fastai's own optimizer state goes by
position and loads into another network without a word.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from fastai.learner import Learner
from torch import Tensor, nn

from ..modules import unwrap
from ..splitters import beside_the_model
from .generators import check_generators, generators_of, set_generators
from .optimizer import check_optimizer, load_opt, opt_state
from .plain import plain_values


def snapshot(learn: Learner, *, fixed: Collection[str] = ()) -> dict:
    """A copy, in main memory, of all that `put_back` restores; for parameters named in `fixed` the live ones stand.

    Raises:
        TypeError: an optimizer that keeps something else than tensors, numbers and texts.
    """
    params = _params(learn)
    return {
        "model": {
            n: plain_values(t)
            for n, t in {**params, **dict(unwrap(learn.model).named_buffers())}.items()
            if n not in fixed
        },
        "fixed": list(fixed),
        # Between two batches gradients are None or zeros, so zeros are told by None and not stored.
        "grads": {n: plain_values(p.grad) if p.grad.any() else None for n, p in params.items() if p.grad is not None},
        "opt": None if learn.opt is None else opt_state(learn),
        "random": generators_of(learn),
    }


def put_back(learn: Learner, state: Mapping) -> None:
    """Give `learn` the weights, buffers, gradients, optimizer state and random states of a `snapshot`, in place.

    Raises (before anything is changed):
        ValueError: names, shapes or dtypes of the tensors differ, or the optimizer's kind, settings or order of parameters,
            or the random generators of the data loaders.
    """
    check_fits(learn, state)
    _agree_on_opt(learn, state["opt"])
    params = _params(learn, state)
    with torch.no_grad():
        for name, tensor in [*params.items(), *unwrap(learn.model).named_buffers()]:
            if name not in state["fixed"]:
                tensor.copy_(state["model"][name])
    for name, p in params.items():
        grad = state["grads"].get(name)
        p.grad = (
            None
            if name not in state["grads"]
            else torch.zeros_like(p)
            if grad is None
            else grad.to(p.device, copy=True)
        )
    if learn.opt is not None:
        load_opt(learn, state["opt"])
    set_generators(learn, state["random"])


def check_fits(learn: Learner, state: Mapping) -> None:
    """Raise ValueError where `put_back` would refuse; an optimizer that does not exist yet is not made for it."""
    params = _params(learn, state)
    tensors = {**params, **dict(unwrap(learn.model).named_buffers())}
    _check_same({n: t for n, t in tensors.items() if n not in state["fixed"]}, state["model"])
    _check_grads(params, state["grads"])
    check_generators(learn, state["random"])
    if learn.opt is not None and state["opt"] is not None:
        check_optimizer(learn, state["opt"])


def _agree_on_opt(learn: Learner, saved: Mapping | None) -> None:
    """An optimizer like the saved one, or none where there was none; the learner's own again where it is of another kind."""
    own, lr = learn.opt, learn.lr
    try:
        if saved is None:
            learn.opt = None
        elif own is None:
            learn.create_opt()
            check_optimizer(learn, saved)
    except BaseException:
        learn.opt, learn.lr = own, lr
        raise


def _params(learn: Learner, state: Mapping | None = None) -> dict[str, nn.Parameter]:
    """Those of the model, and of a loss that trains with it; `state` was taken of those to put back."""
    saved = {} if state is None else {**state["model"], **dict.fromkeys(state["fixed"])}
    besides = beside_the_model(learn, also=saved)
    if state is not None and state["opt"] is None:
        # Without an optimizer nobody said what it would train besides the model.
        besides = {n: p for n, p in besides.items() if n in saved}
    return {**dict(unwrap(learn.model).named_parameters()), **besides}


def _check_same(tensors: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
    only_here, only_there = [n for n in tensors if n not in saved], [n for n in saved if n not in tensors]
    if only_here or only_there:
        raise ValueError(
            f"the checkpoint is of another network: {len(only_there)} of its tensors are not in this one "
            f"({', '.join(only_there[:3]) or '-'}), {len(only_here)} of this one's are not in it "
            f"({', '.join(only_here[:3]) or '-'})"
        )
    for name, tensor in tensors.items():
        if tensor.shape != saved[name].shape:
            raise ValueError(
                f"the checkpoint is of another network: {name} is {tuple(tensor.shape)} here and "
                f"{tuple(saved[name].shape)} in it"
            )
        if tensor.dtype != saved[name].dtype:
            raise ValueError(
                f"the checkpoint is of a network in another precision: {name} is {tensor.dtype} here and "
                f"{saved[name].dtype} in it. Convert the network first"
            )


def _check_grads(params: Mapping[str, nn.Parameter], saved: Mapping[str, Tensor | None]) -> None:
    for name, grad in saved.items():
        if name not in params:
            raise ValueError(
                f"the checkpoint is of another network: it has a gradient of {name}, which is not in this one"
            )
        if grad is not None and (grad.shape, grad.dtype) != (params[name].shape, params[name].dtype):
            raise ValueError(
                f"the checkpoint is of another network: the gradient of {name} is {tuple(grad.shape)} {grad.dtype} in it, "
                f"and the parameter {tuple(params[name].shape)} {params[name].dtype} here"
            )
