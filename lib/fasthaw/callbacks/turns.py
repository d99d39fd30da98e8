"""Parts that train in turn inside one fit: generator and critic, actor and critic, layers in alternation.

A part that waits its turn does not require grad, as a frozen one, and will be back. Fastai's `GANTrainer` says so itself;
any other is known once it has come back: it trained, was switched off and is on again. From then on it is not held.
"""

from __future__ import annotations

from typing import Any, cast

from fastai.learner import Learner
from torch import nn

from ..modules import unwrap


class Turns:
    """Which parameters wait their turn, and which the user froze inside a part that takes turns."""

    def __init__(self) -> None:
        self._frozen: dict[int, nn.Parameter] = {}
        self._seen_on: set[int] = set()
        self._off_since: set[int] = set()
        self._back: set[int] = set()
        self._halves: set[int] = set()

    def __getstate__(self) -> dict:
        return {}  # a copy belongs to another network

    def __setstate__(self, state: dict) -> None:
        Turns.__init__(self)

    def begin(self, learn: Learner) -> None:
        """At the start of a fit, before a `GANTrainer` switches: what is off in a half that is on was frozen by the user."""
        self._seen_on, self._off_since, self._back = set(), set(), set()
        gan, model = hasattr(learn, "gan_trainer"), cast(Any, unwrap(learn.model))
        halves = [list(half.parameters()) for half in (model.generator, model.critic)] if gan else []
        self._halves = {id(p) for half in halves for p in half}
        for half in halves:
            if any(p.requires_grad for p in half):
                for p in half:
                    self._frozen.pop(id(p), None)
                self._frozen |= {id(p): p for p in half if not p.requires_grad}

    def keep_frozen(self) -> None:
        """Switch off again what the user froze, in place: a `GANTrainer` switches whole halves on."""
        for p in self._frozen.values():
            p.requires_grad_(False)

    def begin_stage(self, params: list[nn.Parameter]) -> None:
        """What was switched between two epochs is a stage of training and no turn."""
        self._seen_on, self._off_since = {id(p) for p in params if p.requires_grad}, set()

    def see(self, params: list[nn.Parameter]) -> None:
        """Take note of what a batch trains."""
        on = {id(p) for p in params if p.requires_grad}
        self._back |= on & self._off_since
        self._off_since = (self._off_since | (self._seen_on - on)) - on
        self._seen_on |= on

    def waiting(self, params: list[nn.Parameter]) -> set[int]:
        """The ids of those parameters that are off and wait their turn."""
        halves = self._halves - self._frozen.keys()
        return {id(p) for p in params if not p.requires_grad and (id(p) in halves or id(p) in self._back)}

    def of_halves(self, p: nn.Parameter) -> bool:
        """Whether a `GANTrainer` switches it: then all is left as it is without us, gradients included."""
        return id(p) in self._halves
