"""Every random generator that training draws from: those of the process, and those that data loaders keep to themselves."""

from __future__ import annotations

import random
from collections.abc import Mapping

import numpy as np
import torch
from fastai.learner import Learner

from ..modules import unwrap
from ..randomness import random_state, set_random_state

# Where DistributedDL, accelerate's loaders and the cache keep the loader.
_INSIDE = ("dl", "base_dataloader", "source")


def loaders_inside(loader: object) -> list:
    """The loader and those inside it that it shares out among processes; the last one knows the data set."""
    found = [loader]
    while True:
        own = getattr(found[-1], "__dict__", {})  # a list of batches has none
        inner = next((own[k] for k in _INSIDE if hasattr(own.get(k), "dataset")), None)
        if inner is None:
            return found
        found.append(inner)


def generators_of(learn: Learner) -> dict:
    """The state of every generator that training draws from, as plain values; those of the learner's data loaders too.

    Of the GPUs those of the network and its batches alone, so that a run may go on where there are fewer.
    """
    state = random_state(_gpus(learn))
    name, keys, *rest = state["numpy"]
    numpys = (name, torch.from_numpy(keys.astype(np.int64)), *rest)
    return {**state, "numpy": numpys, "loaders": [_state_of(g) for g in _generators(learn)]}


def set_generators(learn: Learner, state: Mapping) -> None:
    """Put every generator back to where `generators_of` found it, in place; call `check_generators` first."""
    name, keys, *rest = state["numpy"]
    numpys = (name, keys.numpy().astype(np.uint32), *rest)
    set_random_state({**state, "numpy": numpys}, _gpus(learn) if state["cuda"] else ())
    for generator, its_state in zip(_generators(learn), state["loaders"], strict=True):
        generator.setstate(its_state) if isinstance(generator, random.Random) else generator.set_state(its_state)


def check_generators(learn: Learner, state: Mapping) -> None:
    """Raise ValueError where the learner has other generators than those of `generators_of`."""
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
    found: list[random.Random | torch.Generator] = []
    for loader in (inner for outer in learn.dls.loaders for inner in loaders_inside(outer)):
        sampler, own = getattr(loader, "sampler", None), getattr(loader, "__dict__", {})
        for value in (own.get("rng"), own.get("generator"), getattr(sampler, "generator", None)):
            if isinstance(value, random.Random | torch.Generator) and all(value is not f for f in found):
                found.append(value)
    return found


def _state_of(generator: random.Random | torch.Generator):
    return generator.getstate() if isinstance(generator, random.Random) else generator.get_state()
