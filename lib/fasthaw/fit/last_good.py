"""The state after the last good epoch, in main memory: copies of what can move, and of nothing else.

What is frozen is not copied: the live tensors stand for it. A sum over the bits of each, which costs a hundredth of a copy, is
compared from epoch to epoch; what has moved all the same (an average of the weights inside the network) is copied from then
on. What starts to train in the middle of a fit is copied just before its first step.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from fastai.callback.core import Callback
from fastai.learner import Learner
from torch import Tensor, nn

from ..checkpoint import put_back, snapshot
from ..checkpoint.plain import plain_values
from ..modules import unwrap
from ..outside.torch import Uninitialized, is_wrapper

_SAMPLE = 64


class LastGood:
    """A learner's last good state; `best` is another one, of which the same is kept."""

    def __init__(self, learn: Learner) -> None:
        self.learn = learn
        self.state: dict = {}
        self.best: dict | None = None
        self.fixed: dict[str, nn.Parameter] = {}  # the live parameters that stand for themselves
        self._sums: dict[str, object] = {}
        self._movers: set[str] = set()

    @property
    def sums(self) -> dict[str, object]:
        """For each of `fixed`, what differs when its bits do."""
        return {n: self._sums[n] for n in self.fixed}

    def take(self) -> None:
        """Copy the state of now; the copy of before is let go first, so that there are never two."""
        off, now = self._look()
        self._movers |= {n for n, s in now.items() if self._sums.get(n, s) != s}
        self.fixed = {n: p for n, p in off.items() if n not in self._movers}
        self._sums, self.state = now, {}
        self.state = snapshot(self.learn, fixed=self.fixed)

    def resume(self, state: Mapping) -> None:
        """Take a loaded state for that of now, once the learner has it; what is frozen now is let go."""
        self.fixed, self._sums = self._look()
        model = {n: t for n, t in state["model"].items() if n not in self.fixed}
        self.state = {**state, "model": model, "fixed": list(self.fixed)}

    def _look(self) -> tuple[dict[str, nn.Parameter], dict[str, object]]:
        """What is frozen now, and what differs for each when its bits do."""
        params = unwrap(self.learn.model).named_parameters()
        sums = {n: (p, s) for n, p in params if not p.requires_grad and (s := sum_of_bits(p)) is not None}
        return {n: p for n, (p, _) in sums.items()}, {n: s for n, (_, s) in sums.items()}

    def copy_what_trains(self) -> None:
        """Copy what was frozen when the state was taken and is on now; it has not moved yet."""
        on = [n for n, p in self.fixed.items() if p.requires_grad]
        for name in on:
            copied = plain_values(self.fixed[name])
            for kept in (self.state, self.best):
                if kept is not None:
                    kept["model"].setdefault(name, copied)
        for name in on:
            del self.fixed[name]
        if on:
            self.state["fixed"] = list(self.fixed)

    def put_back(self) -> list[str]:
        """Give the learner this state, in place; returns the names of what has moved and was not copied."""
        lost = [n for n, p in self.fixed.items() if sum_of_bits(p) != self._sums[n]]
        put_back(self.learn, self.state)
        return lost


class CopyWhatTrains(Callback):
    """Copy what somebody unfreezes in the middle of a fit, before it is stepped."""

    order = float("-inf")  # accumulation may end a batch here, and a later step sees what was missed

    def __init__(self, last: LastGood) -> None:
        self.last = last

    def before_step(self) -> None:
        self.last.copy_what_trains()


def sum_of_bits(t: Tensor) -> object:
    """What differs when the bits of a tensor do, for all but a swap among its numbers; None for one that has no plain bits."""
    if t.layout != torch.strided or t.is_meta or t.is_quantized or is_wrapper(t) or isinstance(t, Uninitialized):
        return None
    flat = t.detach().reshape(-1).view(torch.uint8) if t.numel() else torch.empty(0, dtype=torch.uint8)
    whole = len(flat) // 8 * 8
    long = flat[:whole].view(torch.int64)
    sample = long[:: max(1, len(long) // _SAMPLE)]
    return int(long.sum()), sample.tolist(), flat[whole:].tolist()
