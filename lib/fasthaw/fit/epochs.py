"""Callbacks of a plan's run: stop at a non-finite loss, keep the last good epoch, resume a fit where it stopped.

fastai's `start_epoch` fires the events of the epochs that it skips, and callbacks act on them again: here those epochs do
not happen (`epochs_from`), and what has to know of them is told (`ResumedHistory`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from fastai.callback.core import Callback, CancelFitException, TrainEvalCallback
from fastai.callback.tracker import ReduceLROnPlateau, TrackerCallback
from fastai.learner import Learner, Recorder
from fastai.torch_core import L

from ..checkpoint import set_generators
from ..outside.fastai import begin_at, begin_at_the_first, only_validates
from ..together import Processes
from .carried import StateOfCallbacks
from .processes import processes_of


class StopAtNonFinite(Callback):
    """Stop the fit when the loss is no finite number, in any of the processes that train together; `found` says where.

    Each batch looks at the loss of the batch before, so that a GPU is not waited for.
    """

    order = -5  # right after the modes are set

    def __init__(self) -> None:
        self.found, self._at = "", 0
        self._finite: torch.Tensor | None = None
        self._processes = Processes(several=False)

    def before_fit(self) -> None:
        self._finite, self.found = None, ""
        self._processes = processes_of(self.learn)

    def after_batch(self) -> None:
        self._check()
        self._finite, self._at = torch.isfinite(self.learn.loss.detach()).all(), self.learn.iter

    def after_train(self) -> None:
        self._check()

    def after_validate(self) -> None:
        self._check()

    def _check(self) -> None:
        finite, self._finite = self._finite, None
        if finite is None or not self._processes.any_of(~finite):
            return
        part = "training" if self.learn.training else "validation"
        self.found = f"in epoch {self.learn.epoch + 1}, {part} batch {self._at + 1}"
        raise CancelFitException


class KeepEpochs(Callback):
    """Call `keep` with the number of finished epochs after every epoch but the last."""

    order = float("inf")  # after every other callback of the epoch

    def __init__(self, keep: Callable[[int], None], start: int, epochs: int) -> None:
        self.keep, self.start, self.epochs, self.begun = keep, start, epochs, False

    def before_fit(self) -> None:
        if only_validates(self.learn):
            return
        if self.begun or self.learn.n_epoch != self.epochs:
            came = "a second fit" if self.begun else f"a fit of {self.learn.n_epoch} epochs"
            raise ValueError(f"the fit of a stage calls learn.fit once, for its {self.epochs} epochs; {came} came")
        self.begun = True

    def after_epoch(self) -> None:
        if only_validates(self.learn):
            return
        done = self.learn.epoch + 1
        if self.start < done < self.learn.n_epoch:
            self.keep(done)


class AtEpoch(Callback):
    """Let the fit begin at epoch `start`: callbacks that ask in `before_fit` which epoch it is get the right answer."""

    order = TrainEvalCallback.order + 0.5  # it counts from 0

    def __init__(self, start: int) -> None:
        self.start = start

    def before_fit(self) -> None:
        self.learn.epoch, self.learn.train_iter = self.start, self.start * len(self.learn.dls.train)
        self.learn.pct_train = self.start / self.learn.n_epoch


class ResumedHistory(Callback):
    """Tell recorder and loggers of the epochs before, and give callbacks what they carried on from them.

    A tracker that was not there then learns from the values of those epochs.
    """

    order = float("inf")  # after each of them has begun its fit

    def __init__(self, history: Sequence[dict], states: StateOfCallbacks, carried: Mapping) -> None:
        self.history, self.states, self.carried = history, states, carried

    def before_fit(self) -> None:
        recorder = vars(self.learn).get("recorder")
        if recorder is not None:
            self._tell(recorder)
        self.states.give_back(self.learn, self.carried)

    def _tell(self, recorder: Recorder) -> None:
        names = [n for n in recorder.metric_names[1:] if not (recorder.add_time and n == "time")]
        trackers = [cb for cb in self.learn.cbs.sorted("order") if isinstance(cb, TrackerCallback) and cb.run]
        trackers = [cb for cb in trackers if not self.states.knows(self.carried, cb)]
        for epoch, values in enumerate(self.history):
            row = L(values.get(n) for n in names)
            recorder.values.append(row)
            self.learn.final_record = row.copy()
            recorder.log = L(epoch) + row + (L("-") if recorder.add_time else L())
            self.learn.logger(recorder.log)
            for tracker in trackers:
                _remember(tracker)


class SameRandomNumbers(Callback):
    """Begin the first epoch with the random states of back then, whatever was drawn on the way there."""

    order = -1000  # before any callback may draw a random number

    def __init__(self, random: Mapping) -> None:
        self.random: Mapping | None = random

    def before_epoch(self) -> None:
        random, self.random = self.random, None
        if random is not None:
            set_generators(self.learn, random)


@contextmanager
def epochs_from(learn: Learner, start: int) -> Iterator[None]:
    """Within it a fit of the learner has its epochs from `start` on alone."""
    begin_at(learn, start)
    try:
        yield
    finally:
        begin_at_the_first(learn)


def _remember(tracker: TrackerCallback) -> None:
    """What a tracker knows after an epoch whose values the recorder has; it does not act on them again."""
    if tracker.learn.recorder.values[-1][tracker.idx] is None:  # a metric that the run did not have then
        return
    TrackerCallback.after_epoch(tracker)
    if hasattr(tracker, "wait"):
        tracker.wait = 0 if tracker.new_best else tracker.wait + 1
        if isinstance(tracker, ReduceLROnPlateau) and tracker.wait >= tracker.patience:
            tracker.wait = 0


def epoch_values(learn: Learner, since: int) -> list[dict]:
    """What fastai's recorder wrote in each epoch of the current fit from `since` on, by name."""
    recorder = vars(learn).get("recorder")
    if recorder is None:
        return [{} for _ in range(since, learn.epoch + 1)]
    names = recorder.metric_names[1:]
    return [dict(zip(names, values, strict=False)) for values in recorder.values[since:]]
