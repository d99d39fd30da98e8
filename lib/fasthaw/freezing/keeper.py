"""Keeping a contract: what is held is worked out when told to, asked for cheaply, and let go at the end.

One keeper serves every loop: `FrozenEval` tells it a fastai learner's events, `hold_frozen` the forwards of any other.
Looks on the side (noise, flags) are attempts: what a network raises in one means that the look was not made, never that
training stops.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Sequence
from operator import attrgetter, itemgetter
from typing import TypeVar

from torch import nn

from ..groups import LayerGroup
from ..modules import unwrap
from ..pinned import keep_pinned
from ..untouched import untouched
from .contract import FreezeContract
from .flags import FlagMeans, eager, few, flags_that_mean_more, reads_flag
from .modes import held_containers, held_modules, hold, makes_noise, mute, needs_train_mode, release
from .noise import leaking_noise, spanning
from .selection import fix_affine, frozen

# Asked of every tensor and module in every batch: by `map` in C, at half of what a loop costs.
_requires_grad, _training, _training_in = attrgetter("requires_grad"), attrgetter("training"), itemgetter("training")
T = TypeVar("T")


class Keeper:
    """Holds what `contract` says of some layer groups; `waiting` are parameters that wait their turn and are not frozen."""

    def __init__(self, contract: FreezeContract) -> None:
        self.contract = contract
        self.groups: tuple[LayerGroup, ...] = ()
        self.frozen: tuple[bool, ...] = ()
        self.params: list[nn.Parameter] = []
        self.held: list[tuple[str, nn.Module]] = []
        self.kept: dict[int, FlagMeans] = {}
        self._waiting: frozenset[int] = frozenset()
        self._live: list[nn.Parameter] = []
        self._off: list[nn.Parameter] = []
        self._still: list[dict] = []
        self._scripted: list[nn.Module] = []
        self._muted: list = []
        self._tried: dict[int, nn.Module] = {}
        self._found: list[str] = []
        self._noise: dict[tuple, str | None] = {}

    def __getstate__(self) -> dict:
        return {"contract": self.contract}  # a copy belongs to another network

    def __setstate__(self, state: dict) -> None:
        Keeper.__init__(self, state["contract"])

    def take(self, groups: tuple[LayerGroup, ...], waiting: Collection[int] = ()) -> list[nn.Parameter]:
        """Set `requires_grad` and gradients of `groups` by the contract; returns the parameters that are frozen.

        What waits its turn is left as it is, and is not among them.
        """
        keep_pinned(groups)
        self._waiting = frozenset(waiting)
        self.groups, self.frozen = groups, self.frozen_now(groups)
        resting = [g for g in groups if not any(id(p) in waiting for p in g.params())]
        fix_affine(resting, trained=self.contract.norm_affine == "trained")
        self.params = [p for g in groups for p in g.params()]
        self._live = [p for p in self.params if p.requires_grad]
        self._off = [p for p in self.params if not p.requires_grad]
        off = [p for p in self._off if id(p) not in self._waiting]
        for p in off:
            p.grad = None
        return off

    def flipped(self) -> bool:
        """Whether what requires grad is no longer what it was when taken."""
        return True in map(_requires_grad, self._off) or False in map(_requires_grad, self._live)

    def frozen_now(self, groups: Sequence[LayerGroup]) -> tuple[bool, ...]:
        """Which groups are frozen: one with a parameter that waits its turn is not."""
        waits = [any(id(p) in self._waiting for p in g.params()) for g in groups]
        return tuple(f and not w for f, w in zip(frozen(groups), waits, strict=True))

    def live(self) -> list[nn.Parameter]:
        """The parameters that required grad when taken."""
        return self._live

    def lost(self) -> bool:
        """Whether something that required grad when taken does so no more."""
        return False in map(_requires_grad, self._live)

    def hold(self, model: nn.Module) -> None:
        """Work out which modules of `model` are held now, hold them, and let go of those that no longer are."""
        release(self._muted)
        now = held_modules(self.groups, self.contract, self.frozen)
        now += held_containers(unwrap(model), self.groups, self.contract, self.frozen)
        released = {id(m) for _, m in self.held} - {id(m) for _, m in now}
        for _, module in self.held:
            if id(module) in released:
                module.training = True
        self.held = now
        self._set()

    def hold_again(self) -> None:
        """Hold where somebody put a held module in training mode since."""
        if any(map(_training_in, self._still)) or any(map(_training, self._scripted)):
            self._set()

    def _set(self) -> None:
        self._muted += hold(self.held, self.kept)
        still = [m for _, m in self.held if not (needs_train_mode(m) or id(m) in self.kept)]
        self._still = [vars(m) for m in still if "training" in vars(m)]
        self._scripted = [m for m in still if "training" not in vars(m)]  # its flag is TorchScript's

    def release(self) -> None:
        """Give muted modules their own rates back."""
        release(self._muted)

    def look(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        """Look for flags that mean more than noise, and for noise, in `model(*args, **kwargs)`, on the side."""
        model = unwrap(model)
        if any(id(m) not in self._tried and reads_flag(m) for _, m in self.held):
            _attempt(lambda: self._try_parts(model, *few(args, kwargs)), "whether a held flag means more than noise")
        self.say()
        self.look_for_noise(model, args, kwargs)

    def _try_parts(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        """Try each held part with what it is called with in one forward of the network."""
        with untouched(model, eager(), seed=0):
            for _, module in self.held:
                module.register_forward_pre_hook(self.try_part, with_kwargs=True)
            model(*args, **kwargs)
        # The look put all attributes back; what it found is set for good here.
        for meaning in self.kept.values():
            meaning.module.training = True
        self._set()

    def try_part(self, part: nn.Module, args: tuple, kwargs: dict) -> None:
        """Find the flags in a held part, as it is called for the first time, that mean more than noise."""
        if id(part) in self._tried:
            return
        name_of = {id(m): n for n, m in self.held}
        inside = [m for m in part.modules() if id(m) in name_of]
        suspects = [(name_of[id(m)], m) for m in inside if id(m) not in self._tried and reads_flag(m)]
        self._tried |= {id(m): m for m in inside}
        if not suspects:
            return
        found = _attempt(
            lambda: flags_that_mean_more(part, suspects, *few(args, kwargs)),
            "",
        )
        if found is None:
            self._found.append(
                f"{name_of[id(part)] or 'the model'} could not be run on the side, so it is not known whether a training "
                "flag in it decides more than noise: it is held in eval mode"
            )
        for meaning in found or ():
            if meaning.keeps:
                self.kept[id(meaning.module)] = meaning
                meaning.module.training = True
                self._muted += mute(meaning.module)
            if not meaning.quiet:
                self._found.append(str(meaning))

    def say(self) -> None:
        """Warn of what the looks found, after them: what is raised inside a look would be taken for the network's."""
        while self._found:
            warnings.warn(self._found.pop(0), stacklevel=2)

    def look_for_noise(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        """Warn of noise that a module which holds frozen and trained layers makes between the frozen ones."""
        if self.contract.hold_noise == "nowhere" or not any(self.frozen):
            return
        known = (id(model), self.contract, self.frozen, sum(len(g.modules) for g in self.groups))
        if known not in self._noise:
            suspects = spanning(model, self.groups)
            matters = any(makes_noise(m) for m in suspects.values())
            self._noise[known] = _attempt(
                lambda: leaking_noise(model, self.groups, self.frozen, args, kwargs),
                f"whether {', '.join(n or 'model' for n in suspects)} makes noise between frozen layers" * matters,
            )
        if self._noise[known] is not None:
            warnings.warn(
                f"{self._noise[known]} makes noise inside the frozen layers: it holds layers that train as well, so it stays "
                "in training mode. Set its own dropout or layer dropout to 0 where you want frozen layers exact",
                stacklevel=2,
            )


def _attempt(look: Callable[[], T], at_stake: str) -> T | None:
    """What `look` finds; None, and a warning where anything is at stake, when the network does not let itself be looked at."""
    try:
        return look()
    # The forward is the user's: it may raise anything, for being run once more or with two items. The fit does neither.
    except Exception as error:  # noqa: BLE001
        if at_stake:
            warnings.warn(
                f"the network could not be run on the side ({type(error).__name__}: {error}), so it is not known {at_stake}",
                stacklevel=2,
            )
        return None
