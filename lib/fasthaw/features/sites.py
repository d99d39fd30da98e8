"""Sites: the calls of frozen modules in a forward, and how each can be watched or answered in the module's place.

A call is answered by an attribute `forward` on the module itself, which is taken away again: the class, the flags, the hooks
and the `state_dict` stay what they are, and the network's own forward runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn

from ..groups import LayerGroup
from ..undo import Standin, Undone
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
        with untouched(model, torch.no_grad(), seed=0):
            if not training:
                model.eval()
            for m in model.modules():
                m.register_forward_pre_hook(lambda m, args: called.add(id(m)))
            model(*inputs)
    return called


def learns(module: nn.Module) -> bool:
    """Whether a module has something that training could move: parameters or buffers."""
    return next(module.parameters(), None) is not None or next(module.buffers(), None) is not None


class Rerouted(Undone):
    """Sends the calls of some modules to `around(key, real, *args, **kwargs)` while it is entered.

    Entering costs a dictionary entry a module, so that it can be done around every batch.
    """

    def __init__(self, modules: Mapping[str, nn.Module], around: Callable) -> None:
        super().__init__(self._put_in, self._take_out)
        self._around, self._counts = around, dict.fromkeys(modules, 0)
        self._standins = [Standin(m, "forward", self._call(name, m.forward)) for name, m in modules.items()]

    def _call(self, name: str, real: Callable) -> Callable:
        around, counts = self._around, self._counts

        def forward(*args, **kwargs):
            n = counts[name]
            counts[name] = n + 1
            return around((name, n), real, *args, **kwargs)

        return forward

    def _put_in(self) -> None:
        self._counts.update(dict.fromkeys(self._counts, 0))
        for one in self._standins:
            one.put_in()

    def _take_out(self) -> None:
        for one in self._standins:
            one.take_out()
