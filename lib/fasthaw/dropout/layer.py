"""The mechanism: a dropout layer as a child of the module whose activation it follows.

The child has no parameters, so no key of the state dict changes; `train()`, `eval()` and a held layer group reach it
like any other module; and it draws a new mask each time it is applied, so one ReLU that is used twice drops twice. After
a module's output a forward hook applies it. An activation function called inside a forward is caught by a
`TorchFunctionMode`, which lives only as long as that forward (a pair of hooks would leave it on after Ctrl-C).
"""

from __future__ import annotations

import inspect
import threading
from contextlib import nullcontext
from types import CodeType

import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from ..outside.torch import DropoutNd
from .activations import KIND_OF_FUNCTION

AFTER_OUTPUT, AFTER_CALLS = "inserted_dropout", "inserted_dropout_after_calls"
KINDS = ("auto", "channel", "element")

_state = threading.local()


class InsertedDropout(DropoutNd):
    """Zeroes with probability `p` in training mode and scales the rest by `1 / (1 - p)`; never in place.

    `kind` is "channel" (whole channels of `(n, c, ...)`, as `nn.Dropout2d`), "element" (as `nn.Dropout`), or "auto": by
    channel from four dimensions on.
    """

    handle: RemovableHandle  # of the hook, where the child is applied by one

    def __init__(self, p: float, kind: str, after: str) -> None:
        super().__init__(p)
        self.kind, self.after = kind, after

    def forward(self, x: Tensor) -> Tensor:
        if not isinstance(x, Tensor):
            raise TypeError(
                f"dropout was inserted after a module that returns a {type(x).__name__}; it needs one tensor. "
                "remove_dropout(model), and name a module inside it"
            )
        if not self.training or self.p == 0:
            return x
        if self.kind == "element" or (self.kind == "auto" and x.dim() < 4):
            return F.dropout(x, self.p)
        return x * F.dropout(x.new_ones(x.shape[:2] + (1,) * (x.dim() - 2)), self.p)

    def extra_repr(self) -> str:
        return f"p={self.p:g}, kind={self.kind}"


def drop_output(host: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
    """The forward hook; a function of a module, not a closure, so that it pickles."""
    child: InsertedDropout = host._modules[AFTER_OUTPUT]  # type: ignore[assignment]
    return child(output) if child.training else None


class WatchedForward:
    """Stands in for `host.forward`: what it calls is dropped out there, and by no `WatchedForward` around it.

    With no `kinds` it only does the latter. Calls belong to the innermost watched forward that is running.
    """

    def __init__(self, host: nn.Module, kinds: frozenset[type[nn.Module]] = frozenset()) -> None:
        self.host, self.kinds = host, kinds

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(type(self.host).forward.__get__(self.host))

    @property
    def __code__(self) -> CodeType:
        return type(self.host).forward.__code__  # torch.export reports where a network is defined

    def __call__(self, *args, **kwargs):
        forward, around = type(self.host).forward, getattr(_state, "watch", None)
        child: InsertedDropout | None = self.host._modules.get(AFTER_CALLS)  # type: ignore[assignment]
        drops = child if child is not None and child.training else None
        if drops is None and around is None:  # nothing to keep apart; torch 2.4 cannot compile the rest
            return forward(self.host, *args, **kwargs)
        _state.watch = self
        try:
            with nullcontext() if drops is None else _DropCalls(self, drops):
                return forward(self.host, *args, **kwargs)
        finally:
            _state.watch = around


class _DropCalls(TorchFunctionMode):
    def __init__(self, watch: WatchedForward, child: InsertedDropout) -> None:
        super().__init__()
        self.watch, self.child = watch, child

    def __torch_function__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        if KIND_OF_FUNCTION.get(func) in self.watch.kinds and _state.watch is self.watch:
            return self.child(output)
        return output


def add(host: nn.Module, child: InsertedDropout) -> None:
    """Apply `child` to every output of `host`, in place."""
    child.train(host.training)
    host.add_module(AFTER_OUTPUT, child)
    # The child keeps the handle: unpickling it tells torch which hook numbers are taken.
    child.handle = host.register_forward_hook(drop_output)


def add_after_calls(host: nn.Module, child: InsertedDropout, kinds: frozenset[type[nn.Module]]) -> None:
    """Apply `child` to every activation of these kinds that the forward of `host` calls as a function, in place."""
    child.train(host.training)
    host.add_module(AFTER_CALLS, child)
    host.forward = WatchedForward(host, kinds)


def take_out(host: nn.Module) -> None:
    """Undo all of the above on one module, in place."""
    child = host._modules.pop(AFTER_OUTPUT, None)
    if isinstance(child, InsertedDropout):
        child.handle.remove()
    host._modules.pop(AFTER_CALLS, None)
    if isinstance(vars(host).get("forward"), WatchedForward):
        del host.forward
