"""Forwards that leave no trace: a network may be run to learn about it, and then it is as it was."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn


@contextmanager
def untouched(model: nn.Module, *, seed: int | None = None) -> Iterator[None]:
    """Puts random state and every module's attributes, hooks and buffers back on leaving; inside, `seed` where given.

    Attributes count, as a language model keeps its hidden state there, and hooks, as Transformers' models register theirs in
    their first forward.
    """
    kept = [_Kept(m) for m in model.modules()]
    try:
        with _same_random_numbers():
            if seed is not None:
                torch.manual_seed(seed)
                random.seed(seed)
            yield
    finally:
        for one in kept:
            one.put_back()


class _Kept:
    """What a module was."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.attributes = module, dict(vars(module))
        # Hooks and the like stay in the dictionaries that they are in: handles point there.
        self.keys = [(d, set(d)) for d in self.attributes.values() if isinstance(d, dict)]
        self.buffers = {n: b.clone() for n, b in module._buffers.items() if b is not None}

    def put_back(self) -> None:
        vars(self.module).clear()
        vars(self.module).update(self.attributes)
        for dictionary, keys in self.keys:
            for key in dictionary.keys() - keys:
                del dictionary[key]
        with torch.no_grad():
            for name, buffer in self.buffers.items():
                self.module._buffers[name].copy_(buffer)


@contextmanager
def _same_random_numbers() -> Iterator[None]:
    """Puts the random state of Python, NumPy and torch back on leaving."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
