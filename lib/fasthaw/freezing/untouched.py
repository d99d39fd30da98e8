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
    """Puts random state and every module's attributes and buffers back on leaving; inside, `seed` where given.

    Attributes count, as a language model keeps its hidden state there.
    """
    kept = [(m, dict(vars(m)), {n: b.clone() for n, b in m._buffers.items() if b is not None}) for m in model.modules()]
    try:
        with _same_random_numbers():
            if seed is not None:
                torch.manual_seed(seed)
                random.seed(seed)
            yield
    finally:
        with torch.no_grad():
            for module, attributes, buffers in kept:
                vars(module).clear()
                vars(module).update(attributes)
                for name, buffer in buffers.items():
                    module._buffers[name].copy_(buffer)


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
