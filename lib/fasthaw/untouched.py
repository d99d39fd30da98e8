"""Forwards that leave no trace: a network may be run to learn about it, and then it is as it was.

What a forward may change is written down before, module by module, and put back: it is not known what a network does.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from contextlib import AbstractContextManager, ExitStack

import torch
from torch import Tensor, nn

from .outside.torch import Uninitialized, run_as_written
from .randomness import random_state, seed_all, set_random_state
from .undo import Undone


class untouched(Undone):
    """A `with` block that leaves network and random state as they were; inside, generators are seeded with `seed` where given.

    Modes, attributes, hooks, buffers, `requires_grad`, gradients, the grad mode and the random state of the process are put
    back. Attributes count with the lists, dictionaries, sets and tensors in them, as a language model keeps its hidden state
    there; hooks, as Transformers' models register theirs in their first forward. Inside, gradients are away, and a network
    that was compiled in place runs as it was written. Weights are not copied, except those that an embedding with `max_norm`
    scales in its forward. `inside` are contexts that are entered last, and left first.

    Raises:
        ValueError: a lazy layer, which the first forward would turn into another one for good.
    """

    def __init__(self, model: nn.Module, *inside: AbstractContextManager, seed: int | None = None) -> None:
        super().__init__(self._begin, self._end)
        self._model, self._inside, self._seed = model, inside, seed
        self._stack = ExitStack()
        self._kept: tuple[Network, dict] | None = None
        self._grads: list[tuple[nn.Parameter, Tensor | None]] = []

    def _begin(self) -> None:
        self._stack, self._grads, self._kept = ExitStack(), [], None
        self._kept = Network(self._model), random_state()
        for p in self._model.parameters():
            self._grads.append((p, p.grad))
            p.grad = None
        for module in self._model.modules():
            run_as_written(module)
        if self._seed is not None:
            seed_all(self._seed)
        for context in self._inside:
            self._stack.enter_context(context)

    def _end(self) -> None:
        try:
            self._stack.close()
        finally:
            if self._kept is not None:
                network, numbers = self._kept
                network.put_back()
                for p, grad in self._grads:
                    p.grad = grad
                set_random_state(numbers)


class Network:
    """What a network was, besides the values of its weights and their gradients: `put_back` makes it so again, in place.

    The grad mode counts as well: Ctrl-C in the way out of torch's own `no_grad` leaves it off.
    """

    def __init__(self, model: nn.Module) -> None:
        lazy = next((n for n, p in _tensors(model) if isinstance(p, Uninitialized)), None)
        if lazy is not None:
            raise ValueError(f"{lazy} has no shape yet (a lazy layer): send one batch through the model first")
        self._grad_mode = torch.is_grad_enabled()
        self._modules = [(m, dict(vars(m))) for m in model.modules()]
        self._flags = [(p, p.requires_grad) for p in model.parameters()]
        self._parts = _Parts()
        for module, attributes in self._modules:
            self._parts.add(v for k, v in attributes.items() if k not in ("_parameters", "_modules"))
            # Their tensors are weights and their modules are looked at by themselves, so only the names are kept.
            kept = [d for d in (module._parameters, module._modules) if isinstance(d, dict)]  # not those of a script
            self._parts.containers += [(d, dict(d)) for d in kept]
            self._parts.add(module._buffers.values())
            if getattr(module, "max_norm", None) is not None:
                self._parts.keep(module.get_parameter("weight"))

    def put_back(self) -> None:
        """Make the network what it was."""
        torch.set_grad_enabled(self._grad_mode)
        for module, attributes in self._modules:
            vars(module).clear()
            vars(module).update(attributes)
        self._parts.put_back()
        for p, flag in self._flags:
            if p.requires_grad != flag:
                p.requires_grad_(flag)


class _Parts:
    """Containers, and the tensors in them, that may be changed in place."""

    def __init__(self) -> None:
        self.containers: list[tuple[dict | list | set | deque, dict | list | set]] = []
        self._tensors: list[tuple[Tensor, Tensor]] = []
        self._seen: dict[int, object] = {}

    def add(self, values: Iterable) -> None:
        """Write down these values, and what is in them."""
        waiting = list(values)
        while waiting:
            value = waiting.pop()
            if not isinstance(value, Tensor | dict | list | set | tuple | deque) or id(value) in self._seen:
                continue
            self._seen[id(value)] = value
            if isinstance(value, Tensor):
                if not isinstance(value, nn.Parameter):
                    self.keep(value)
                continue
            if not isinstance(value, tuple):
                plain = dict if isinstance(value, dict) else set if isinstance(value, set) else list
                self.containers.append((value, plain(value)))
            waiting += value.values() if isinstance(value, dict) else value

    def keep(self, tensor: Tensor) -> None:
        """Write down the numbers of a tensor; one on the meta device has none."""
        if not tensor.is_meta:
            self._tensors.append((tensor, tensor.detach().clone()))

    def put_back(self) -> None:
        """Give each its contents again, in place: a tensor that was not written to may be part of a graph."""
        for container, before in self.containers:
            _refill(container, before)
        with torch.no_grad():
            for tensor, numbers in self._tensors:
                if tensor.shape != numbers.shape or tensor.dtype != numbers.dtype:
                    tensor.data = numbers
                elif numbers.layout != torch.strided or not torch.equal(tensor, numbers):
                    tensor.copy_(numbers)


def _refill(container, before) -> None:
    if isinstance(container, dict):
        if [(k, id(v)) for k, v in container.items()] != [(k, id(v)) for k, v in before.items()]:
            container.clear()
            container.update(before)
    elif isinstance(container, set):
        if container != before:
            container.clear()
            container.update(before)
    elif list(map(id, container)) != list(map(id, before)):
        container.clear()
        container.extend(before)


def _tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]
