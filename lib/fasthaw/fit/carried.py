"""What callbacks carry from one epoch to the next: kept where we know it, refused where a resume would lose it.

`EarlyStopping` and `ReduceLROnPlateau` follow from the recorded values; `GradientAccumulation`'s count and the loss scale of
mixed precision are kept. Counters and lists of other callbacks begin anew, which a warning says. What holds weights,
generators, modules or optimizers of its own (an average of the weights, an anchor) would change what is trained, so it is
refused by name.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator, Mapping

import numpy as np
import torch
from fastai.callback.core import Callback
from fastai.callback.tracker import TrackerCallback
from fastai.callback.training import GradientAccumulation
from fastai.learner import Learner
from torch import Tensor, nn

from ..checkpoint.digests import digest_of
from ..modules import unwrap
from ..words import some_of

_REFUSED = {"NonNativeMixedPrecision", "GANTrainer", "FixedGANSwitcher", "AdaptiveGANSwitcher"}
_WAYS = "a resumed run would go on without it. Leave it out, or run without a checkpoint"


def carried(learn: Learner) -> dict:
    """What callbacks we know carry on, as plain values."""
    scaler = vars(learn).get("scaler")
    return {
        "accumulated": [cb.count for cb in learn.cbs if isinstance(cb, GradientAccumulation)],
        "scaler": {} if scaler is None else scaler.state_dict(),
    }


def give_back(learn: Learner, saved: Mapping) -> None:
    """Give callbacks what `carried` returned, in place."""
    for cb, count in zip(
        (cb for cb in learn.cbs if isinstance(cb, GradientAccumulation)), saved["accumulated"], strict=False
    ):
        cb.count = count
    scaler = vars(learn).get("scaler")
    if scaler is not None and saved["scaler"]:
        scaler.load_state_dict(saved["scaler"])


def check_callbacks(learn: Learner) -> None:
    """Raise ValueError for a callback that is known to carry on what no checkpoint holds."""
    for cb in learn.cbs:
        if any(c.__name__ in _REFUSED for c in type(cb).__mro__):
            raise ValueError(f"{type(cb).__name__} keeps a state that no checkpoint holds: {_WAYS}")
        if isinstance(cb, TrackerCallback) and not cb.reset_on_fit:
            raise ValueError(
                f"{type(cb).__name__}(reset_on_fit=False) keeps its best value from one stage to the next: {_WAYS}"
            )


class StateOfCallbacks(Callback):
    """Refuse callbacks whose state no checkpoint holds: before the first batch where it is there, else after one epoch."""

    order = 999  # after other callbacks, and before an epoch is kept

    def __init__(self, learn: Learner) -> None:
        self.refused, self._begin = False, {id(cb): _state(learn, cb) for cb in _others(learn)}
        self._looked: set[str] = set()
        self._plain = {id(cb): _plain(cb) for cb in _others(learn)}

    def before_batch(self) -> None:
        if self.training:
            self._look("batch")

    def after_epoch(self) -> None:
        first = "epoch" not in self._looked
        self._look("epoch")
        if first:
            self._say_what_begins_anew()

    def _say_what_begins_anew(self) -> None:
        moved = [
            f"{type(cb).__name__}.{k}"
            for cb in _others(self.learn)
            for k, v in _plain(cb).items()
            if v != self._plain.get(id(cb), {}).get(k)
        ]
        if moved:
            warnings.warn(
                f"{some_of(moved)} changed in this epoch, and no checkpoint holds it: in a resumed run it begins anew. "
                "Where it decides how training goes on, run without a checkpoint",
                stacklevel=3,
            )

    def _look(self, when: str) -> None:
        if when in self._looked:
            return
        self._looked.add(when)
        for cb in _others(self.learn):
            before = self._begin.get(id(cb), {})
            odd = [k for k, v in _state(self.learn, cb).items() if v != before.get(k)]
            if odd:
                self.refused = True
                raise ValueError(
                    f"{type(cb).__name__} keeps weights, random generators or modules of its own from one epoch to the next "
                    f"({', '.join(odd)}), which no checkpoint holds: {_WAYS}"
                )


def _others(learn: Learner) -> list[Callback]:
    return [cb for cb in learn.cbs if type(cb).__module__.partition(".")[0] not in ("fastai", "fasthaw")]


def _plain(cb: Callback) -> dict[str, object]:
    """The numbers and texts of a callback, and how long its lists and dictionaries are."""
    found = {k: len(v) if isinstance(v, list | dict | set) else v for k, v in vars(cb).items()}
    return {k: v for k, v in found.items() if isinstance(v, bool | int | float | str)}


def _state(learn: Learner, cb: Callback) -> dict[str, str]:
    """A digest for each attribute of `cb` that holds something that would change what is trained."""
    model = unwrap(learn.model)
    own = {id(x) for x in (learn, learn.opt, model, *model.modules(), *model.parameters(), *model.buffers())}
    shapes = {p.shape for p in model.parameters() if p.numel() > 1}
    found = {k: list(_kept(v, shapes, own, 4)) for k, v in vars(cb).items() if k != "learn"}
    return {k: digest_of(v) for k, v in found.items() if v}


def _kept(value: object, shapes: set, own: set[int], depth: int) -> Iterator[object]:
    if id(value) in own or depth == 0:
        return
    if isinstance(value, Tensor | np.ndarray):
        if torch.Size(value.shape) in shapes:
            yield value
    elif isinstance(value, nn.Module):
        yield from value.state_dict().values()
    elif isinstance(value, torch.optim.Optimizer):
        yield value.state_dict()
    elif isinstance(value, torch.Generator):
        yield value.get_state()
    elif isinstance(value, random.Random):
        yield value.getstate()
    elif isinstance(value, np.random.Generator):
        yield value.bit_generator.state
    elif isinstance(value, np.random.RandomState):
        yield value.get_state()
    elif isinstance(value, Mapping | list | tuple):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _kept(part, shapes, own, depth - 1)
    elif not isinstance(value, type | Callback) and hasattr(value, "__dict__"):
        for part in vars(value).values():
            yield from _kept(part, shapes, own, depth - 1)
