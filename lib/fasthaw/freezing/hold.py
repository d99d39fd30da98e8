"""Frozen parts held in any training loop: bare PyTorch, Lightning, Transformers' `Trainer`.

`model.train()` undoes every `.eval()`, so what is frozen is put in order where the network is called: a forward pre-hook on
each module that is held, or that holds frozen and trained layers. A deep copy or a pickle of the network is not held.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from ..groups import LayerGroup
from ..modules import unwrap
from ..outside.torch import call_compiled_by, compiled_call
from ..splitters import Splitter, layer_groups
from .contract import FreezeContract
from .keeper import Keeper
from .proof import Proof
from .watch import Watch


def hold_frozen(
    model: nn.Module,
    splitter: Splitter | Sequence[LayerGroup] | None = None,
    contract: FreezeContract = FreezeContract(),  # noqa: B008 (a frozen value)
) -> HeldFrozen:
    """Hold what is frozen in `model` by `contract` from now on, in any loop: a context manager, or until `.release()`.

    What is frozen is read from `requires_grad`, at every call of the network: `train_only(groups, -1)` or
    `model.encoder.requires_grad_(False)` are the switch. Frozen groups of `splitter` (`split_stages()` by default) run in
    eval mode whatever `model.train()` says, module by module; their norm parameters are fixed with the rest, and what does
    not require grad has no gradient, so that no optimizer moves it. On leaving, modes, dropout rates and `requires_grad`
    are as they were. `.report()` proves by fingerprints that nothing frozen moved.

    Returns:
        What holds: a context manager with `release()` and `report()`.

    Raises:
        TypeError: no network, no contract, or a splitter of another kind.
        SplitError: the groups do not cover the network exactly once.

    >>> from fasthaw import split_at
    >>> net = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout()), nn.Linear(4, 2))
    >>> _ = net[0].requires_grad_(False)
    >>> with hold_frozen(net, split_at("1")) as held:
    ...     x = torch.randn(8, 4)
    ...     same = torch.equal(net.train()(x), net.train()(x))
    >>> same, held.report().verdict()
    (True, 'Proved: none of 7 held tensors changed a bit.')
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"hold_frozen takes a network, an nn.Module; {model!r} came")
    if not isinstance(contract, FreezeContract):
        raise TypeError(f"hold_frozen takes a FreezeContract; {contract!r} came")
    if splitter is None or isinstance(splitter, Splitter):
        groups = layer_groups(model, splitter)
    elif isinstance(splitter, Sequence) and splitter and all(isinstance(g, LayerGroup) for g in splitter):
        groups = tuple(splitter)
    else:
        raise TypeError(f"hold_frozen takes a splitter such as split_stages(), or layer groups; {splitter!r} came")
    return HeldFrozen(model, groups, contract)


class HeldFrozen:
    """What `hold_frozen(model, groups, contract)` returns: holds until `release()`, then has a `report()`.

    It is a context manager as well, which releases at the end of its block.
    """

    def __init__(self, model: nn.Module, groups: tuple[LayerGroup, ...], contract: FreezeContract) -> None:
        self._model, self._groups = model, groups
        self._modes = [(m, m.training) for m in unwrap(model).modules()]
        self._flags = [(p, p.requires_grad) for g in groups for p in g.params()]
        self._keeper = Keeper(contract)
        self._proof: Proof | None = None
        self._keeper.take(groups)
        self._fixed = [(p, flag) for p, flag in self._flags if p.requires_grad != flag]
        self._keeper.hold(model)
        self._watch = Watch(lambda: groups, contract)
        self._looked: set[int] = set()
        own = unwrap(model)
        inside = {id(m) for g in groups for m in g.modules.values()}
        held = {id(m) for _, m in self._keeper.held}
        self._spanning = {id(m) for m in own.modules() if id(m) not in inside} | {id(own)}
        wrappers = [] if model is own else [model]
        # What trains now may be frozen later, and is then held by the calls of what is around it.
        watched = [m for m in own.modules() if id(m) in held | self._spanning]
        hook = _Entering(self)
        self._handles = [m.register_forward_pre_hook(hook, with_kwargs=True) for m in [*wrappers, *watched]]
        # `module.compile()` takes the hooks into what it compiles, where they do nothing: there the call itself is preceded.
        self._compiled = [(m, call) for m in own.modules() if (call := compiled_call(m)) is not None]
        for module, call in self._compiled:
            call_compiled_by(module, _preceded(hook, module, call))

    def __repr__(self) -> str:
        names = ", ".join(g.name for g, f in zip(self._groups, self._keeper.frozen, strict=True) if f) or "nothing"
        return f"{'holds' if self._handles else 'held'} {names} frozen by {self._keeper.contract}"

    def __enter__(self) -> HeldFrozen:
        return self

    def __exit__(self, *_) -> None:
        self.release()

    def release(self) -> None:
        """Let go: modes, dropout rates and the `requires_grad` that the contract set are as they were. Twice is once."""
        if not self._handles:
            return
        self._watch.see_grads()
        self._proof = self._watch.finished()
        while self._handles:
            self._handles.pop().remove()
        for module, call in self._compiled:
            call_compiled_by(module, call)
        self._keeper.release()
        held = {id(m) for _, m in self._keeper.held}
        # In eval mode since: `model.eval()` was the last word, and with nothing that trains nobody can tell.
        trains = unwrap(self._model).training or id(unwrap(self._model)) in held
        for module, mode in self._modes:
            if id(module) in held and trains:
                module.training = mode
        for p, flag in self._fixed:
            p.requires_grad_(flag)

    def report(self) -> Proof:
        """What was proved; while it holds, up to now."""
        return self._watch.so_far() if self._proof is None else self._proof

    def entering(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Put in order what is frozen, as a module is about to be called."""
        keeper = self._keeper
        if id(module) not in self._spanning and not module.training and id(module) in self._looked:
            return
        if keeper.flipped():
            self._watch.look_again()
            keeper.take(self._groups)
            keeper.hold(self._model)
        keeper.hold_again()
        training = torch.is_grad_enabled() and any(m.training for m, _ in self._modes)
        if training and id(module) not in self._looked:
            self._look(module, args, kwargs)

    def _look(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self._looked |= {id(m) for m in module.modules()}
        if id(module) in self._spanning:
            self._looked -= {id(m) for _, m in self._keeper.held}
            self._keeper.look_for_noise(module, args, kwargs)
        else:
            self._keeper.try_part(module, args, kwargs)
            self._keeper.say()


def _preceded(hook: _Entering, module: nn.Module, call: Callable) -> Callable:
    def preceded(*args, **kwargs):
        hook(module, args, kwargs)
        return call(*args, **kwargs)

    return preceded


class _Entering:
    """The pre-hook: a network's copy takes along one that does nothing."""

    def __init__(self, held: HeldFrozen | None = None) -> None:
        self.held, self.busy = held, False

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        # In a compiled forward there is nothing to do: what is around it has put all in order.
        if torch.compiler.is_compiling() or self.held is None or self.busy:
            return
        self.busy = True
        try:
            self.held.entering(module, args, kwargs)
        finally:
            self.busy = False

    def __deepcopy__(self, memo: dict) -> _Entering:
        return _Entering()

    def __reduce__(self) -> tuple:
        return _Entering, ()
