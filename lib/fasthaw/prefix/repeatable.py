"""Draws beside other threads: the generators of the process are theirs as well, so where these stand tells too little.

What torch draws is known by the operations of this thread, which can be seeded one by one. What Python and NumPy draw is
known by its effect: two forwards from other seeds, which either differ or do not.
"""

from __future__ import annotations

import random
import threading
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from torch import Tensor, nn

from ..outside.torch import TorchDispatchMode, named_arguments
from ..untouched import untouched
from .structure import flatten


def is_only_thread() -> bool:
    """Whether no other thread can draw from the generators of the process."""
    return threading.active_count() == 1


def may_draw(func) -> bool:
    """Whether an operation of torch is one that may draw."""
    return torch.Tag.nondeterministic_seeded in func.tags


def draws_by_its_arguments(func, args: tuple, kwargs: dict) -> bool:
    """Whether an operation that may draw does: dropout at rate 0 or outside of training draws nothing."""
    named = named_arguments(func, args, kwargs)
    if named.get("train", True) is False:
        return False
    if func.overloadpacket.__name__.startswith("_scaled_dot_product"):
        return bool(named.get("dropout_p", 0))
    rate = named.get("p", 1)  # a tensor of rates, or one
    return isinstance(rate, Tensor) or bool(rate)


def repeatable() -> AbstractContextManager:
    """Within it torch draws the same in each forward; alone in the process, seeding before the forward is enough."""
    return nullcontext() if is_only_thread() else _Reseeded()


class _Reseeded(TorchDispatchMode):
    """Seeds torch's generators before each operation that draws, by how many there were: one that is left out drew nothing."""

    def __init__(self) -> None:
        super().__init__()
        self._n = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if may_draw(func) and draws_by_its_arguments(func, args, kwargs):
            self._n += 1
            torch.default_generator.manual_seed(self._n)
            if torch.cuda.is_initialized():
                torch.cuda.manual_seed_all(self._n)
        return func(*args, **kwargs)


def numbers_come_in(model: nn.Module, inputs: tuple, *, training: bool) -> bool:
    """Whether what Python or NumPy draw changes what the network returns, in the modes it is in or in eval mode."""
    found = []
    for seed in (1, 2):
        with untouched(model, torch.no_grad(), repeatable(), seed=0):
            if not training:
                model.eval()
            random.seed(seed)
            np.random.seed(seed)
            found.append([t for t in flatten(model(*inputs))[0] if isinstance(t, Tensor)])
    return len(found[0]) != len(found[1]) or not all(map(_same, *found))


def _same(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.layout != torch.strided:
        return a.shape == b.shape and torch.equal(a.to_dense(), b.to_dense())
    return bool(((a == b) | (a.isnan() & b.isnan())).all()) if a.is_floating_point() else torch.equal(a, b)
