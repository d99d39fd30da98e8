"""Sites: the calls of frozen modules in a forward, and how each can be watched or answered in the module's place.

A call is answered by an attribute `forward` on the module itself, which is taken away again: the class, the flags, the hooks
and the `state_dict` stay what they are, and the network's own forward runs.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import nn

from ..groups import LayerGroup
from ..untouched import untouched

Key = tuple[str, int]  # a module's dotted name, and which of its calls in one forward, from 0


def candidates(
    model: nn.Module, groups: Sequence[LayerGroup], frozen: Sequence[bool], inputs: tuple
) -> dict[str, nn.Module]:
    """The outermost modules that may compute the same again: wholly frozen ones, and those without parameters and buffers.

    Only what a forward of `inputs` calls counts: a `ModuleList` is opened into its parts, and so is what is called by parts.

    The latter may be in any group: an activation that belongs to the head can be called at the stem, and a head's pooling need
    not run again either. A module that a forward hook looks into is opened into its parts; one that is also used inside
    another of them is left out, as its calls could not be counted.
    """
    names = {n for g, f in zip(groups, frozen, strict=True) if f for n in g.modules}
    hooked, called = {id(m) for m in model.modules() if m._forward_hooks}, _called(model, inputs)
    found: dict[str, nn.Module] = {}

    def look(name: str, module: nn.Module) -> None:
        inside = [m for m in module.modules() if m is not module]
        may = id(module) in called and (name in names or not learns(module))
        if may and not any(id(m) in hooked for m in inside):
            found[name] = module
            return
        for child, m in module.named_children():
            look(f"{name}.{child}" if name else child, m)

    look("", model)
    within = {id(i) for m in found.values() for i in m.modules() if i is not m}
    return {n: m for n, m in found.items() if id(m) not in within}


def _called(model: nn.Module, inputs: tuple) -> set[int]:
    """The modules, by identity, that the network calls in training or in eval mode."""
    called: set[int] = set()
    for training in (True, False):
        with untouched(model, seed=0), torch.no_grad():
            if not training:
                model.eval()
            handles = [m.register_forward_pre_hook(lambda m, args: called.add(id(m))) for m in model.modules()]
            try:
                model(*inputs)
            finally:
                for handle in handles:
                    handle.remove()
    return called


def learns(module: nn.Module) -> bool:
    """Whether a module has something that training could move: parameters or buffers."""
    return next(module.parameters(), None) is not None or next(module.buffers(), None) is not None


class Rerouted:
    """Sends the calls of some modules to `around(key, real, *args, **kwargs)` while it is entered.

    Entering costs a dictionary entry a module, so that it can be done around every batch.
    """

    def __init__(self, modules: Mapping[str, nn.Module], around: Callable) -> None:
        self._around, self._counts = around, dict.fromkeys(modules, 0)
        self._modules = [(m, self._wrapped(name, m), m.__dict__.get("forward")) for name, m in modules.items()]

    def _wrapped(self, name: str, module: nn.Module) -> Callable:
        real, around, counts = module.forward, self._around, self._counts

        def forward(*args, **kwargs):
            n = counts[name]
            counts[name] = n + 1
            return around((name, n), real, *args, **kwargs)

        return forward

    def __enter__(self) -> Rerouted:
        self._counts.update(dict.fromkeys(self._counts, 0))
        for module, forward, _ in self._modules:
            module.__dict__["forward"] = forward
        return self

    def __exit__(self, *exc) -> None:
        for module, _, before in self._modules:
            if before is None:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = before


def rng_state() -> tuple:
    """The random state of Python, NumPy and torch, to see whether it moved."""
    numpy = np.random.get_state()
    devices = [torch.cuda.get_rng_state().numpy().tobytes()] if torch.cuda.is_available() else []
    return random.getstate(), numpy[1].tobytes(), numpy[2], torch.get_rng_state().numpy().tobytes(), *devices
