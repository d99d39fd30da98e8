"""Where dropout can go in a network: found first, as values, so that a bad request changes nothing."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass

from torch import nn

from ..modules import parent_name
from ..outside.torch import ConvNd, NormBase
from ..words import shown
from .activations import ACTIVATIONS, called_kinds, kind_of
from .gates import in_gates
from .layer import InsertedDropout

_CHANNELS_FIRST = (ConvNd, NormBase, nn.GroupNorm)
_LISTS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)

After = type[nn.Module] | str | Sequence[type[nn.Module] | str]


@dataclass(frozen=True)
class Place:
    """After the output of `host`; or, where there are `calls`, after the activation functions its forward calls."""

    name: str
    host: nn.Module
    calls: frozenset[type[nn.Module]] = frozenset()

    @property
    def after(self) -> str:
        return "+".join(sorted(f"F.{k.__name__.lower()}" for k in self.calls)) or type(self.host).__name__


def find_places(model: nn.Module, after: After) -> list[Place]:
    """The places after what `after` names, in registration order; each member of it must occur.

    A type stands for modules of it, for the classes of its kind in timm and Transformers, and for its functions. A
    string is a regular expression for the whole dotted name of a module. Gates are left out unless a string names them.
    """
    wanted = tuple(after) if isinstance(after, Sequence | Set) and not isinstance(after, str | bytes) else (after,)
    _check_after(wanted)
    gates = in_gates(model)
    occurs: set[object] = set()
    in_gate: set[object] = set()
    places: dict[tuple[int, bool], Place] = {}
    for name, module in ((n, m) for n, m in model.named_modules() if not isinstance(m, InsertedDropout)):
        by_type = [w for w in wanted if isinstance(w, type) and (isinstance(module, w) or kind_of(module) is w)]
        called = called_kinds(module).intersection(wanted)
        if id(module) in gates:
            in_gate.update(by_type, called)
            by_type, called = [], frozenset()
        by_name = [w for w in wanted if isinstance(w, str) and re.fullmatch(w, name)]
        occurs.update(by_type, called, by_name)
        if by_type or by_name:
            places[id(module), False] = Place(name, module)
        if called:
            places[id(module), True] = Place(name, module, called)
    missing = [w for w in wanted if w not in occurs]
    if missing and (after is not ACTIVATIONS or not occurs):
        raise ValueError(_never_occurs(model, missing, in_gate))
    return list(places.values())


class Feeding:
    """What `kind="auto"` becomes at a place: by the layer that feeds it, as a shape does not say where channels are.

    Swin and ConvNeXt run `(n, h, w, c)` through linear layers; by channel there would drop whole rows of the image. Each
    container is walked through once, however many places are in it.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._walked: dict[str, tuple[dict[int, int], list[int], list[nn.Module]]] = {}

    def kind(self, place: Place) -> str:
        """By "element", by "channel", or "auto" where neither is known."""
        feeding = _weights(place.host.modules()) if place.calls else self._feeding(place)
        linear = {isinstance(m, nn.Linear) for m in feeding}
        kinds: dict[tuple[bool, ...], str] = {(True,): "element", (False,): "channel"}
        return kinds.get(tuple(linear), "auto")

    def _feeding(self, place: Place) -> list[nn.Module]:
        """The last layer with weights before a module, or else the first behind it, in the nearest container with any."""
        container = place.name
        while container:
            container = parent_name(container)
            at, positions, layers = self._walk(container)
            behind = bisect_left(positions, at[id(place.host)])
            feeding = layers[behind - 1 : behind] if behind else layers[:1]
            if feeding:
                return feeding
        return []

    def _walk(self, container: str) -> tuple[dict[int, int], list[int], list[nn.Module]]:
        """The position of each module of a container, and positions and modules of those with weights."""
        if container not in self._walked:
            order = list(self._model.get_submodule(container).modules())
            layers = _weights(order)
            at = {id(m): i for i, m in enumerate(order)}
            self._walked[container] = at, [at[id(m)] for m in layers], layers
        return self._walked[container]


def _weights(modules: Iterable[nn.Module]) -> list[nn.Module]:
    return [m for m in modules if isinstance(m, (nn.Linear, *_CHANNELS_FIRST))]


def check_hosts(places: Sequence[Place]) -> None:
    """Raise for what cannot take a child or a watched forward."""
    for name, host, calls in ((p.name, p.host, p.calls) for p in places):
        if isinstance(host, _LISTS):
            how = "name the last module in it" if not calls else "choose the activations by name, without it"
            raise ValueError(
                f"{name or 'the model'} is a {type(host).__name__}: dropout added to it would run as one of its items "
                f"and move their indices; {how}"
            )
        if calls and "forward" in vars(host):
            raise ValueError(
                f"the forward of {name or 'the model'} has been replaced on the instance, so the activations it calls "
                "cannot be followed; insert dropout before the tool that replaced it (such as accelerate) is applied"
            )


def _check_after(wanted: tuple) -> None:
    if not wanted:
        raise ValueError(
            "after= is empty, so there is nothing to insert dropout after; leave it out for every activation"
        )
    odd = [w for w in wanted if not (isinstance(w, str) or (isinstance(w, type) and issubclass(w, nn.Module)))]
    if odd:
        raise TypeError(f"after= takes module classes such as nn.ReLU and module names or regexes; got {shown(odd[0])}")
    for pattern in (w for w in wanted if isinstance(w, str)):
        if not pattern:
            raise ValueError("after= has an empty name, which is that of the whole network; name what is inside it")
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"after={shown(pattern)} is no regular expression: {error}") from error


def _never_occurs(model: nn.Module, missing: list, in_gate: set) -> str:
    names = ", ".join(w if isinstance(w, str) else w.__name__ for w in missing)
    modules = {type(m).__name__ for m in model.modules() if kind_of(m)}
    calls = {f"F.{k.__name__.lower()}" for m in model.modules() for k in called_kinds(m)}
    there = ", ".join(sorted(modules | calls)) or "no known activation"
    gated = " (in squeeze-and-excitation gates alone, which are left out; name the modules to include them)"
    only_gated = gated if in_gate.intersection(missing) else ""
    return f"{names} never occurs in {type(model).__name__}{only_gated}; it has: {there}"
