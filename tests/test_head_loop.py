"""The loop of a cached epoch: the same numbers to the bit, every event where it was; learners of their own way keep it."""

import copy
import pickle
import random

import pytest
import torch
from fastai.callback.core import Callback, CancelBatchException
from fastai.callback.training import GradientAccumulation
from fastai.learner import Learner
from fastai.losses import BCEWithLogitsLossFlat, CrossEntropyLossFlat, LabelSmoothingCrossEntropyFlat
from fastai.metrics import accuracy
from fastai.torch_core import TensorBase
from torch import nn

from data import Items, learner
from fasthaw import FreezeProof, FrozenEval, GroupRecorder, cached_features, split_at, train_only
from fasthaw.features.head_loop import HeadLoop
from networks import residual


class Events(Callback):
    """Every event of the batches, and what the loss was."""

    order = 300

    def __init__(self):
        self.seen, self.kinds = [], set()

    def __call__(self, event):
        self.seen.append((event, self.learn.training))
        if event == "after_loss":
            self.kinds.add(type(self.learn.loss))


def fitted(*cbs, loss=None, as_ever=False, monkeypatch=None, cls=Learner, **kwargs):
    torch.manual_seed(0)
    random.seed(0)
    learn = learner(residual(), splitter=split_at("head"), cbs=[FrozenEval(), *cbs], metrics=accuracy, **kwargs)
    learn.__class__ = cls
    learn.loss_func = loss or CrossEntropyLossFlat()
    train_only(learn, -1)
    if as_ever:
        monkeypatch.setattr(HeadLoop, "start", lambda self: None)
    with cached_features(learn):
        learn.fit(3, 1e-2)
    return learn


STOCK = {
    "nothing more": lambda: (),
    "recorders": lambda: (GroupRecorder(), FreezeProof()),
    "accumulation": lambda: (GradientAccumulation(16),),
    "somebody's": lambda: (Events(),),
}


@pytest.mark.parametrize("cbs", STOCK)
def test_weights_losses_and_metrics_are_the_same_to_the_bit(cbs, monkeypatch):
    swift = fitted(*STOCK[cbs]())
    as_ever = fitted(*STOCK[cbs](), as_ever=True, monkeypatch=monkeypatch)
    assert all(map(torch.equal, swift.model.parameters(), as_ever.model.parameters()))
    assert list(map(float, swift.recorder.losses)) == list(map(float, as_ever.recorder.losses))
    assert swift.recorder.values == as_ever.recorder.values and swift.recorder.lrs == as_ever.recorder.lrs


@pytest.mark.parametrize("loss", [LabelSmoothingCrossEntropyFlat(), nn.CrossEntropyLoss()])
def test_every_loss_is_the_same_to_the_bit(loss, monkeypatch):
    swift, as_ever = fitted(loss=loss), fitted(loss=loss, as_ever=True, monkeypatch=monkeypatch)
    assert all(map(torch.equal, swift.model.parameters(), as_ever.model.parameters()))


def test_a_loss_that_makes_numbers_of_its_targets_is_the_same(monkeypatch):
    learn = learner(residual(), splitter=split_at("head"))
    pred, target = torch.randn(6, 1), torch.tensor([0, 1, 1, 0, 1, 0])
    learn.loss_func, learn.pred, learn.yb = BCEWithLogitsLossFlat(), pred, (target,)
    loop = HeadLoop(learn)
    loop._fire("after_pred")
    found = loop._loss()
    assert type(found) is torch.Tensor and torch.equal(found, torch.Tensor(learn.loss_func(pred, target)))
    learn.loss_func, learn.pred, learn.yb = CrossEntropyLossFlat(), torch.randn(6, 3), (target.to(torch.int8),)
    assert torch.equal(loop._loss(), torch.Tensor(learn.loss_func(learn.pred, *learn.yb)))


def test_somebody_elses_callback_gets_every_event_and_fastais_type(monkeypatch):
    class Listens(Events):
        def before_batch(self): ...

        before_step = after_loss = after_batch = after_pred = before_backward = after_step = before_batch

    swift, as_ever = fitted(Listens()), fitted(Listens(), as_ever=True, monkeypatch=monkeypatch)
    names = {"before_batch", "before_step", "after_loss", "after_batch", "after_pred", "before_backward", "after_step"}
    one, other = ([e for e in learn.listens.seen if e[0] in names] for learn in (swift, as_ever))
    assert one == other and one and swift.listens.kinds == as_ever.listens.kinds == {TensorBase}


def test_a_batch_can_be_cancelled():
    class Cancels(Callback):
        def __init__(self):
            self.cancelled = 0

        def before_batch(self):
            if self.training and self.learn.iter == 0:
                raise CancelBatchException

        def after_cancel_batch(self):
            self.cancelled += 1

    learn = fitted(Cancels())
    assert learn.cancels.cancelled == 3 and len(learn.recorder.lrs) == 6  # fastai records a cancelled batch as well


def test_a_learner_of_its_own_way_keeps_it():
    class Mine(Learner):
        steps = 0

        def _step(self):
            type(self).steps += 1
            super()._step()

    fitted(cls=Mine)
    assert Mine.steps == 6


def test_nothing_is_left_on_the_learner_and_copies_take_none_of_it_along():
    class Copies(Callback):
        def after_batch(self):
            self.copied = pickle.loads(pickle.dumps(self.learn.model)), copy.copy(self.learn.dls.train.dataset)

    learn = fitted(Copies())
    assert not {"_call_one", "_with_events", "_do_one_batch", "_set_device"} & set(vars(learn))
    assert isinstance(learn.copies.copied[1], Items)
