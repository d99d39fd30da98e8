"""Every random generator that training draws from: Python's, numpy's, torch's, and those of the data loaders."""

from __future__ import annotations

import random
from collections.abc import Mapping

import numpy as np
import torch
from fastai.learner import Learner

from ..modules import unwrap


def random_state(learn: Learner) -> dict:
    """The states of every generator that training draws from, those of the learner's data loaders included."""
    name, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(keys.astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
        # Those of the network and its batches alone, so that a run may go on where there are fewer GPUs.
        "cuda": [torch.cuda.get_rng_state(d) for d in _gpus(learn)] if torch.cuda.is_initialized() else [],
        "loaders": [_state_of(g) for g in _generators(learn)],
    }


def set_random_state(learn: Learner, state: Mapping) -> None:
    """Put every generator back to where `random_state` found it, in place; call `check_random_state` first."""
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        for device, its_state in zip(_gpus(learn), state["cuda"], strict=True):
            torch.cuda.set_rng_state(its_state, device)
    for generator, its_state in zip(_generators(learn), state["loaders"], strict=True):
        generator.setstate(its_state) if isinstance(generator, random.Random) else generator.set_state(its_state)


def check_random_state(learn: Learner, state: Mapping) -> None:
    """Raise ValueError where the learner has other generators than those of `random_state`."""
    here, there = _generators(learn), state["loaders"]
    if len(here) != len(there):
        raise ValueError(
            f"the data loaders have {len(here)} random generators of their own, and the checkpoint's had {len(there)}: "
            "they are loaders of another kind"
        )
    for i, (generator, saved) in enumerate(zip(here, there, strict=True)):
        if isinstance(generator, random.Random) is isinstance(saved, torch.Tensor):
            there = "torch's" if isinstance(saved, torch.Tensor) else "Python's"
            raise ValueError(
                f"random generator {i} of the data loaders is a {type(generator).__name__} here, and was {there} in the "
                "checkpoint: they are loaders of another kind"
            )
    n = len(_gpus(learn)) if state["cuda"] else 0
    if state["cuda"] and n != len(state["cuda"]):
        raise ValueError(
            f"the checkpoint is of a run on {len(state['cuda'])} GPUs, and this learner is on {n}: random numbers cannot go "
            "on. Give it the same number of them"
        )


def _gpus(learn: Learner) -> list[torch.device]:
    """The GPUs that the network and its batches are on, in order."""
    model = unwrap(learn.model)
    devices = {t.device for t in (*model.parameters(), *model.buffers())}
    devices.add(torch.device(getattr(learn.dls, "device", None) or "cpu"))
    numbers = {torch.cuda.current_device() if d.index is None else d.index for d in devices if d.type == "cuda"}
    return [torch.device("cuda", i) for i in sorted(numbers)]


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
