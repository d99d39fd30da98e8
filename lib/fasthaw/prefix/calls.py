"""The calls of frozen modules in a forward, and how each can be watched or answered in the module's place.

A call is answered by an attribute `forward` on the module itself, which is taken away again: the class, the flags, the hooks
and the `state_dict` stay what they are, and the network's own forward runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor, nn

from ..groups import LayerGroup
from ..outside.torch import keeps_more_than_tensors
from ..undo import Standin, Undone

Key = tuple[str, int]  # a module's dotted name, and which of its calls in one forward, from 0


def candidates(model: nn.Module, groups: Sequence[LayerGroup], frozen: Sequence[bool]) -> dict[str, nn.Module]:
    """The modules that may compute the same again, at every depth: wholly frozen ones, and those without weights.

    The latter may be in any group: an activation that belongs to the head can be called at the stem, and a head's pooling need
    not run again either. A container of several frozen groups counts as well.
    """
    still = {id(m) for g, f in zip(groups, frozen, strict=True) if f for m in g.modules.values()}

    def may(module: nn.Module) -> bool:
        # Scales and zero points of a quantised layer are buffers that nothing moves, whichever group it has come to.
        own = [m for m in module.modules() if m._parameters or (m._buffers and not _quantised(m))]
        return all(id(m) in still for m in own) and not any(p.requires_grad for p in module.parameters())

    return {name: module for name, module in model.named_modules() if name and may(module)}


def own_buffers(module: nn.Module) -> list[Tensor]:
    """The buffers of a module and its parts that a forward or a step may move."""
    return [b for m in module.modules() if not _quantised(m) for b in m.buffers(False)]


def _quantised(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torch.ao.nn.quantized")


def has_weights(module: nn.Module) -> bool:
    """Whether a module computes by numbers of its own, be they parameters, buffers or, if quantised, neither.

    A class of the user's counts as well: its numbers may be plain attributes.
    """
    return any(
        next(m.parameters(False), None) is not None
        or next(m.buffers(False), None) is not None
        or keeps_more_than_tensors(m)
        or not type(m).__module__.startswith(("torch.nn.", "fastai.layers", "fasthaw."))
        for m in module.modules()
    )


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

    def begin(self) -> None:
        """Count the calls of a new forward."""
        self._counts.update(dict.fromkeys(self._counts, 0))

    def _put_in(self) -> None:
        self.begin()
        for one in self._standins:
            one.put_in()

    def _take_out(self) -> None:
        for one in self._standins:
            one.take_out()
