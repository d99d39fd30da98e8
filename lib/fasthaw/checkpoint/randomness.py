"""Every random generator that training draws from: Python's, numpy's, torch's, and those of the data loaders."""

from __future__ import annotations

import random
from collections.abc import Mapping

import numpy as np
import torch
from fastai.learner import Learner


def random_state(learn: Learner) -> dict:
    """The states of every generator that training draws from, those of the learner's data loaders included."""
    name, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(keys.astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        "loaders": [_state_of(g) for g in _generators(learn)],
    }


def set_random_state(learn: Learner, state: Mapping) -> None:
    """Put every generator back to where `random_state` found it, in place."""
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
    for generator, its_state in zip(_generators(learn), state["loaders"], strict=True):
        generator.setstate(its_state) if isinstance(generator, random.Random) else generator.set_state(its_state)


def _generators(learn: Learner) -> list[random.Random | torch.Generator]:
    """Those that data loaders keep to themselves: fastai's `rng`, torch's `generator`, of the sampler too."""
    found = []
    for loader in learn.dls.loaders:
        sampler = getattr(loader, "sampler", None)
        for value in (vars(loader).get("rng"), vars(loader).get("generator"), getattr(sampler, "generator", None)):
            if isinstance(value, random.Random | torch.Generator) and all(value is not f for f in found):
                found.append(value)
    return found


def _state_of(generator: random.Random | torch.Generator):
    return generator.getstate() if isinstance(generator, random.Random) else generator.get_state()
