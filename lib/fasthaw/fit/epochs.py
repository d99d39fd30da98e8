"""Callbacks of a plan's run: stop at a non-finite loss, keep the last good epoch, take up a fit where it stopped."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from fastai.callback.core import Callback, CancelFitException
from fastai.learner import Learner

from ..checkpoint import random_state, set_random_state, snapshot


class StopAtNonFinite(Callback):
    """Stop the fit when the loss is no finite number; `found` then says where.

    Each batch looks at the loss of the batch before, so that a GPU is not waited for.
    """

    order = -5  # right after the modes are set

    def __init__(self) -> None:
        self.found = ""

    def before_fit(self) -> None:
        self._finite, self.found = None, ""

    def after_batch(self) -> None:
        self._check()
        self._finite, self._at = torch.isfinite(self.learn.loss.detach()).all(), self.learn.iter

    def after_train(self) -> None:
        self._check()

    def after_validate(self) -> None:
        self._check()

    def _check(self) -> None:
        finite, self._finite = self._finite, None
        if finite is None or finite:
            return
        part = "training" if self.learn.training else "validation"
        self.found = f"in epoch {self.learn.epoch + 1}, {part} batch {self._at + 1}"
        raise CancelFitException


class KeepEpochs(Callback):
    """Hand a snapshot and the epochs' values to `keep` after every epoch but the last."""

    order = 1000  # after every other callback of the epoch

    def __init__(self, keep: Callable[[dict, int], None], start: int) -> None:
        self.keep, self.start = keep, start

    def after_epoch(self) -> None:
        done = self.learn.epoch + 1
        if self.start < done < self.learn.n_epoch:
            self.keep(snapshot(self.learn), done)


class TakeUp(Callback):
    """Let the skipped epochs of a resumed fit show their own values, then go on with the random states of back then."""

    order = -1000  # before any callback may draw a random number

    def __init__(self, start: int) -> None:
        self.start = start

    def before_fit(self) -> None:
        self._random = random_state(self.learn)

    def before_epoch(self) -> None:
        if self.learn.epoch == self.start:
            set_random_state(self.learn, self._random)


class ShowSkipped(Callback):
    """Give fastai's recorder, which stays empty in skipped epochs, the values that they had."""

    order = 65  # between the recorder (50) and SkipToEpoch (70)

    def __init__(self, history: Sequence[dict]) -> None:
        self.history = history

    def before_epoch(self) -> None:
        if self.learn.epoch < len(self.history):
            self.learn.recorder.log += list(self.history[self.learn.epoch].values())


def epoch_values(learn: Learner, since: int) -> list[dict]:
    """What fastai's recorder wrote in each epoch of the current fit from `since` on, by name."""
    recorder = vars(learn).get("recorder")
    if recorder is None:
        return [{} for _ in range(since, learn.epoch + 1)]
    names = recorder.metric_names[1:]
    return [dict(zip(names, values, strict=False)) for values in recorder.values[since:]]
