"""In which order the layers of a network run, where that is not the order in which they are registered."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from ..modules import network_of, parent_name, unwrap
from ..outside.torch import tree_leaves
from ..untouched import untouched
from ..words import shown
from .bare import bare_parameters


def execution_order(model: object | nn.Module, sample: object) -> tuple[str, ...]:
    """The names of all modules without children in the order of their first call in one forward pass of `sample`.

    `model` is a network or a learner. Parameters of modules with children (a class token, a temperature) are among them
    where they enter the forward.

    `sample` is what the model is called with: a tensor, a tuple of arguments or a dict of keyword arguments; tensors on
    the meta device will do for a model that is there. One that is not called by itself, as the projection inside an
    attention is not, stands where the module around it is called, or else after the one registered before it.
    The model and the random state are as before afterwards.

    Returns:
        Dotted names, each once.

    Raises:
        ValueError: a lazy layer that has not met its input yet.

    >>> class Backwards(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.second, self.first = nn.Linear(2, 2), nn.Linear(2, 2)
    ...     def forward(self, x):
    ...         return self.second(self.first(x))
    >>> execution_order(Backwards(), torch.zeros(1, 2))
    ('first', 'second')
    """
    model = unwrap(network_of(model))
    called: dict[str, int] = {}
    with untouched(model, torch.no_grad()):
        model.eval()
        for name, module in model.named_modules():
            if name:
                module.register_forward_pre_hook(partial(_note, called, name))
        with _Uses({id(p): n for _, n, p in bare_parameters(model)}, called):
            _call(model, sample)
    at, last = {n: called[n] for _, n, _ in bare_parameters(model) if n in called}, -1
    for name in (n for n, m in model.named_modules() if not m._modules):
        around = name
        while around and around not in called:
            around = parent_name(around)
        last = at[name] = called[around] if around else last
    return tuple(sorted(at, key=at.__getitem__))


class _Uses(TorchFunctionMode):
    """Notes where bare parameters, which are in no call of a module, enter the forward."""

    def __init__(self, names: Mapping[int, str], called: dict[str, int]) -> None:
        super().__init__()
        self.names, self.called = names, called

    def __torch_function__(self, func, types, args=(), kwargs=None):
        for one in tree_leaves((args, kwargs or {})):
            if id(one) in self.names:
                _note(self.called, self.names[id(one)])
        return func(*args, **(kwargs or {}))


def _note(called: dict[str, int], name: str, *_) -> None:
    called.setdefault(name, len(called))


def _call(model: nn.Module, sample: object) -> None:
    # Whatever the network says of a sample that is not for it is passed on, with what was tried.
    try:
        if isinstance(sample, Mapping):
            model(**sample)
        elif isinstance(sample, tuple):
            model(*sample)
        else:
            model(sample)
    except (TypeError, ValueError, RuntimeError, AttributeError, LookupError, NotImplementedError) as error:
        raise ValueError(
            f"{type(model).__name__} cannot be run with this sample, which is what the model is called with (a tensor, a "
            f"tuple of arguments or a dict of keyword arguments); {shown(sample)} came, and the network says: {error}"
        ) from error
