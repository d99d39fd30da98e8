"""The proof of a freeze: fingerprints before and after, and what each batch found in between.

`FrozenEval` makes a freeze hold; this says whether it did, by looking at what no flag can claim: the bits of the tensors.
"""

from __future__ import annotations

import warnings
from functools import partial
from typing import Literal

from fastai.learner import Learner

from ..freezing import FreezeContract, Proof, Watch
from ..outside.fastai import trains_for_good
from ..splitters import layer_groups
from ..words import one_of
from .freeze import FrozenEval
from .one_learner import OneLearner


class FreezeProof(OneLearner):
    """Prove that what is frozen did not move: fingerprints at the start and end of each fit, flags at every batch.

    What must hold still is read from the learner's `FrozenEval`; without one it is `FreezeContract()`, which plain fastai
    does not keep. Group by group the proof tells which tensors moved, which held modules were in training mode, and which
    frozen parameters had a gradient or optimizer state. `on_failure="raise"` raises RuntimeError at the end of a fit in
    which something did not hold, `"warn"` warns. Either way `report()` tells what was found.
    """

    order, run_valid = 200, False  # after all that may change weights, modes and gradients
    _stateattrs = ("_watch",)

    def __init__(self, on_failure: Literal["raise", "warn"] = "raise") -> None:
        self.on_failure = one_of(("raise", "warn"), on_failure, "on_failure")
        self._proof: Proof | None = None
        self._init_state()

    def _init_state(self) -> None:
        self._watch: Watch | None = None

    def report(self) -> Proof:
        """What the last finished fit proved.

        Raises:
            ValueError: no fit has finished yet.
        """
        if self._proof is None:
            raise ValueError("no fit has finished with this FreezeProof yet; fit first, then ask for its report")
        return self._proof

    def before_fit(self) -> None:
        self._watch = None

    def before_train(self) -> None:
        if not trains_for_good(self.learn):
            return
        if self._watch is None:
            self._watch = watch(self.learn)
        self._watch.epoch = self.learn.epoch
        self._watch.look_again()

    def after_pred(self) -> None:
        if self._watch is not None:
            self._watch.see_modes()

    def before_step(self) -> None:
        if self._watch is not None:
            self._watch.see_grads()

    def after_train(self) -> None:
        if self._watch is not None:
            self._watch.see_states()

    def after_fit(self) -> None:
        if self._watch is None:
            return
        self._proof, self._watch = self._watch.finished(), None
        if not self._proof.holds:
            if self.on_failure == "raise":
                raise RuntimeError(self._proof.verdict())
            warnings.warn(self._proof.verdict(), stacklevel=2)


def watch(learn: Learner) -> Watch:
    """What the learner's FrozenEval has to keep, watched from now on."""
    keeper = next((cb.keeper for cb in learn.cbs if isinstance(cb, FrozenEval)), None)
    groups = partial(layer_groups, learn)
    if keeper is None:
        return Watch(groups, FreezeContract(), opt=learn.opt)
    return Watch(groups, keeper.contract, opt=learn.opt, kept=lambda: keeper.kept, frozen_now=keeper.frozen_now)
