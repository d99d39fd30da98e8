"""What a resume needs: weights, buffers, gradients, optimizer state and random states of a learner.

Everything goes by name and is compared with the learner before a tensor is touched: fastai's own optimizer state goes by
position and loads into another network without a word.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from fastai.learner import Learner
from torch import Tensor, nn

from ..modules import unwrap
from .optimizer import check_optimizer, load_opt, opt_state
from .plain import plain
from .randomness import random_state, set_random_state


def snapshot(learn: Learner) -> dict:
    """A copy, in main memory, of all that `put_back` restores.

    Raises:
        TypeError: an optimizer that keeps something else than tensors, numbers and texts.
    """
    model = unwrap(learn.model)
    return {
        "model": plain(dict([*model.named_parameters(), *model.named_buffers()])),
        # Between two batches gradients are None or zeros, so zeros are told by None and not stored.
        "grads": {n: p.grad.detach().cpu() if p.grad.any() else None for n, p in _with_grad(model)},
        "opt": None if learn.opt is None else opt_state(learn),
        "random": random_state(learn),
    }


def put_back(learn: Learner, state: Mapping) -> None:
    """Give `learn` the weights, buffers, gradients, optimizer state and random states of a `snapshot`, in place.

    Raises (before anything is changed):
        ValueError: the names or shapes of the tensors differ, or the optimizer's kind or order of parameters.
    """
    model = unwrap(learn.model)
    tensors = dict([*model.named_parameters(), *model.named_buffers()])
    _check_same(tensors, state["model"])
    if state["opt"] is None:
        learn.opt = None
    elif learn.opt is None:
        learn.create_opt()
    if learn.opt is not None:
        check_optimizer(learn, state["opt"])
    with torch.no_grad():
        for name, tensor in tensors.items():
            tensor.copy_(state["model"][name])
    for name, p in model.named_parameters():
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
    set_random_state(learn, state["random"])


def save(path: Path, state: Mapping) -> None:
    """Write `state` to `path` so that the file is at any moment the old one or the new one, whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(plain(state), file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load(path: Path) -> dict:
    """What `save` wrote; tensors in main memory."""
    return torch.load(path, map_location="cpu", weights_only=True)


def _with_grad(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(n, p) for n, p in model.named_parameters() if p.grad is not None]


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
