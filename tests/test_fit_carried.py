"""What callbacks carry on: kept and given back to the last bit, or refused by name before anything is lost."""

import random
from collections import Counter, OrderedDict, deque
from pathlib import Path

import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.mixup import MixUp
from fastai.callback.tracker import EarlyStoppingCallback, ReduceLROnPlateau, SaveModelCallback
from fastai.callback.training import GradientAccumulation
from fastai.torch_core import L
from torch import nn

from data import learner
from fasthaw.checkpoint.values import NotPlain, ValueReader, ValueWriter, digest_of_node
from fasthaw.fit import fit_plan
from fasthaw.plan import Plan, Stage
from networks import residual
from test_fit_plan import SPLITTER, Interrupt, make, same_state, weights

PLAN = Plan(Stage(3, 1e-2, -1), Stage(2, 1e-3))
# Two training batches an epoch: stopped inside the first stage, at the boundary, inside the second.
MOMENTS = [3, 7, 9]


def resumed(tmp_path, at, cbs, plan=PLAN, **kwargs):
    """Undisturbed and resumed: the learner, the callbacks and the record of each."""
    (tmp_path / "want").mkdir()
    want, theirs = make(path=tmp_path / "want", **kwargs), cbs()
    record = fit_plan(want, plan, cbs=theirs)
    path = tmp_path / "run"
    path.mkdir()
    with pytest.raises(KeyboardInterrupt):
        fit_plan(make(path=path, **kwargs), plan, checkpoint=path, cbs=[Interrupt(at), *cbs()])
    torch.manual_seed(99)  # another process has other random states
    random.seed(99)
    np.random.seed(99)
    learn, own = learner(residual(), splitter=SPLITTER, seed=99, path=path, **kwargs), cbs()
    again = fit_plan(learn, plan, checkpoint=path, cbs=own)
    assert again.resumed
    return (want, theirs, record), (learn, own, again)


class Everything(Callback):
    """Changes an attribute of every kind that is kept, in place and anew."""

    by_class = 0
    listed = []  # noqa: RUF012

    def __init__(self, step=1):
        self.step, self.n, self.log, self.pairs = step, 0, [], {}
        self.same = self.log
        self.seen, self.last, self.lot, self.text = set(), None, L(), "a"
        self.recent, self.counts, self.ordered = deque(maxlen=3), Counter(), OrderedDict()
        self.array, self.tensor = np.zeros(3), torch.zeros(4)
        self.flat = torch.zeros(6)
        self.part = self.flat[2:4]
        self.gone = 1

    def before_fit(self):
        self.n, self.weights = self.n + 100, list(self.learn.model.parameters())
        self.fits = getattr(self, "fits", 0) + 1
        self.device, self.kind, self.shape = torch.device("cpu"), torch.float32, torch.Size([2])
        self.where, self.bytes, self.complex, self.opt_ = Path("a") / "b", b"\0a", 1j, self.learn.opt
        self.average = {id(p): p.detach().clone() for p in self.weights}
        self.live = [p.detach() for p in self.weights]
        self.owner = Parameter(torch.zeros(2))

    def after_batch(self):
        if not self.training:
            return
        self.n += self.step
        type(self).by_class += 1
        self.listed.append(self.n)
        self.log.append((self.n, [self.n]))
        self.pairs[self.n] = self.log[-1]
        self.seen.add(self.n % 5)
        self.lot.append(float(self.learn.loss))
        self.recent.append(self.n)
        self.counts[self.n % 2] += 1
        self.ordered[str(self.n)] = np.float32(self.n)
        self.array[self.n % 3] += 1
        self.tensor.add_(self.learn.loss.detach())
        self.part.add_(1)
        self.text += "b"
        self.last = None if self.last else ("x", 1.5, True)
        vars(self).pop("gone", None)
        for p in self.weights:
            self.average[id(p)].lerp_(p.detach(), 0.1)


Parameter = nn.Parameter


def state_of(cb):
    """All of it, as it can be compared; with what it shares."""
    skip = ("learn", "weights", "average", "opt_", "live")
    found = {k: v for k, v in vars(cb).items() if k not in skip}
    average = [cb.average[id(p)] for p in cb.weights]
    shares = (cb.same is cb.log, cb.pairs[cb.log[-1][0]][1] is cb.log[-1][1], "gone" in vars(cb))
    return found, average, shares, type(cb).by_class, list(type(cb).listed)


def equal(one, other):
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and np.array_equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(equal(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple | deque | L):
        return len(one) == len(other) and all(map(equal, one, other))
    return type(one) is type(other) and (torch.equal(one, other) if torch.is_tensor(one) else one == other)


@pytest.mark.parametrize("at", MOMENTS)
def test_attributes_of_every_plain_kind_go_on_and_share_what_they_shared(tmp_path, at):
    def fresh():
        Everything.by_class, Everything.listed = 0, []
        return [Everything(2), Everything(3)]

    states = []
    (want, _, _), (learn, own, _) = resumed_with_state(tmp_path, at, fresh, states)
    for cb, state in zip(own, states, strict=True):
        found, *rest = state_of(cb)
        assert {k for k in found if not equal(found[k], state[0].get(k))} == set()
        assert found.keys() == state[0].keys() and same_state(rest, list(state[1:]))
        cb.flat[2] = 77
        assert cb.part[0] == 77
        assert all(a is p for a, p in zip(cb.weights, learn.model.parameters(), strict=True))
        assert all(a.data_ptr() == p.data_ptr() for a, p in zip(cb.live, cb.weights, strict=True))
        assert cb.opt_ is learn.opt
    assert weights(learn) == weights(want)


def resumed_with_state(tmp_path, at, fresh, states):
    """As `resumed`; the state of the undisturbed callbacks before others of their class begin."""
    want, theirs = make(), fresh()
    fit_plan(want, PLAN, cbs=theirs)
    states += [state_of(cb) for cb in theirs]
    with pytest.raises(KeyboardInterrupt):
        fit_plan(make(), PLAN, checkpoint=tmp_path, cbs=[Interrupt(at), *fresh()])
    learn, own = make(), fresh()
    return (want, theirs, None), (learn, own, fit_plan(learn, PLAN, checkpoint=tmp_path, cbs=own))


class Average(Callback):
    """An average of the weights, begun when the fit is, and taken at its end."""

    order = 20

    def before_fit(self):
        self.average = {n: p.detach().clone() for n, p in self.learn.model.named_parameters()}

    def after_batch(self):
        for n, p in self.learn.model.named_parameters():
            self.average[n].lerp_(p.detach(), 0.1)

    def after_fit(self):
        with torch.no_grad():
            for n, p in self.learn.model.named_parameters():
                p.copy_(self.average[n])


class Says(Callback):
    """A module of its own, and the two methods that say how it is kept."""

    def __init__(self):
        self.net, self.loaded = nn.Linear(1, 1, bias=False), 0
        nn.init.zeros_(self.net.weight)

    def after_batch(self):
        with torch.no_grad():
            self.net.weight.add_(self.learn.loss.detach())
        self.learn.opt.set_hyper("wd", float(self.net.weight.abs().clamp(max=0.1)))

    def state_dict(self):
        return {"net": self.net.state_dict()}

    def load_state_dict(self, state):
        self.loaded += 1
        self.net.load_state_dict(state["net"])


CARRIED = {
    "average": lambda: [Average()],
    "state_dict": lambda: [Says()],
    "accumulation": lambda: [GradientAccumulation(24)],
    "mixup": lambda: [MixUp()],
    "early stopping": lambda: [EarlyStoppingCallback(min_delta=100.0, patience=2)],
    "early stopping over stages": lambda: [EarlyStoppingCallback(min_delta=0.9, patience=2, reset_on_fit=False)],
    "plateau": lambda: [ReduceLROnPlateau(min_delta=100.0, patience=2)],
    "best model": lambda: [SaveModelCallback()],
    "best model over stages": lambda: [SaveModelCallback(reset_on_fit=False, fname="a"), SaveModelCallback(fname="b")],
}


@pytest.mark.parametrize("at", MOMENTS)
@pytest.mark.parametrize("kind", CARRIED)
def test_a_run_with_callbacks_that_keep_a_state_resumes_to_the_same_bits(tmp_path, kind, at):
    (want, theirs, record), (learn, own, again) = resumed(tmp_path, at, CARRIED[kind])
    assert weights(learn) == weights(want)
    # The running mean that fastai shows as the training loss as well.
    assert [s.history for s in again.stages] == [s.history for s in record.stages]
    assert [t.item() for t in learn.recorder.losses] == [t.item() for t in want.recorder.losses]
    assert learn.recorder.lrs == want.recorder.lrs and learn.recorder.iters == want.recorder.iters
    assert learn.recorder.hps == want.recorder.hps
    for one, other in zip(own, theirs, strict=True):
        assert getattr(one, "best", None) == getattr(other, "best", None)


def test_two_callbacks_of_a_class_are_told_apart_by_what_they_are_set_to(tmp_path):
    class Counts(Callback):
        def __init__(self, step):
            self.step, self.n = step, 0

        def after_batch(self):
            self.n += self.step

    with pytest.raises(KeyboardInterrupt):
        fit_plan(make(), PLAN, checkpoint=tmp_path, cbs=[Counts(1), Counts(100), Interrupt(3)])
    hundreds, ones = Counts(100), Counts(1)
    fit_plan(make(), PLAN, checkpoint=tmp_path, cbs=[hundreds, ones])
    assert (ones.n, hundreds.n) == (20, 2000)


def test_a_list_that_somebody_else_reads_stays_that_list(tmp_path):
    class Logs(Callback):
        def __init__(self, log):
            self.log = log

        def after_epoch(self):
            self.log.append(self.learn.epoch)

    log = []
    with pytest.raises(KeyboardInterrupt):
        fit_plan(make(), PLAN, checkpoint=tmp_path, cbs=[Logs(log), Interrupt(9)])
    log.append("from after the checkpoint")
    fit_plan(make(), PLAN, checkpoint=tmp_path, cbs=Logs(log))
    assert log == [0, 1, 2, 0, 1]


def test_what_did_not_change_is_a_setting_and_may_be_another_one(tmp_path):
    class Counts(Callback):
        def __init__(self, most):
            self.most, self.n = most, 0

        def after_batch(self):
            self.n += 1

    with pytest.raises(KeyboardInterrupt):
        fit_plan(make(), PLAN, checkpoint=tmp_path, cbs=[Counts(5), Interrupt(3)])
    other = Counts(9)
    fit_plan(make(), PLAN, checkpoint=tmp_path, cbs=other)
    assert (other.most, other.n) == (9, 20)


def test_a_callback_that_is_missing_is_told(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        fit_plan(make(), PLAN, checkpoint=tmp_path, cbs=[Average(), Interrupt(3)])
    with pytest.warns(UserWarning, match="the interrupted run had Average, which this one has not"):
        fit_plan(make(), PLAN, checkpoint=tmp_path)


def test_a_resumed_state_is_kept_though_nothing_changes_it_again(tmp_path):
    class Begins(Callback):
        mean = None

        def after_batch(self):
            if self.mean is None:
                self.mean = float(self.learn.x.mean())

    first = None
    for at in (5, 2, 4):
        cb = Begins()
        with pytest.raises(KeyboardInterrupt):
            fit_plan(make(), PLAN, checkpoint=tmp_path, cbs=[cb, Interrupt(at)])
        first = cb.mean if first is None else first
        assert cb.mean == first


# Refused


class Draws(Callback):
    def __init__(self):
        self.own = np.random.default_rng(0)

    def after_batch(self):
        self.own.random()


class Copies(Callback):
    def before_fit(self):
        self.net = nn.Linear(2, 2)


class Late(Callback):
    def after_epoch(self):
        if self.learn.epoch == 1:
            self.odd = object()


class Meter:
    def __init__(self):
        self.n = 0


class Meters(Callback):
    def __init__(self):
        self.meter = Meter()

    def after_batch(self):
        self.meter.n += 1


REFUSED = {
    "Draws.own": (Draws, "a Generator"),
    "Copies.net": (Copies, "a Linear"),
    "Meters.meter": (Meters, "a Meter"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_checkpoint_holds_is_refused_by_name_before_work_is_lost(tmp_path, name):
    cb, what = REFUSED[name]
    learn = make()
    before = weights(learn)
    with pytest.raises(ValueError, match=rf"{name} has changed since the run began and holds {what}.*state_dict"):
        fit_plan(learn, PLAN, checkpoint=tmp_path, cbs=cb())
    assert weights(learn) == before and list(tmp_path.iterdir()) == []
    fit_plan(make(), PLAN, cbs=cb())


def test_what_comes_late_is_refused_with_the_epochs_before_it_kept(tmp_path):
    learn = make()
    with pytest.raises(ValueError, match=r"Late\.odd has changed since the run began"):
        fit_plan(learn, PLAN, checkpoint=tmp_path, cbs=Late())
    assert fit_plan(learn, PLAN, checkpoint=tmp_path).resumed == "Resumed in stage 1 after epoch 1."


def test_callbacks_that_only_watch_are_not_refused(tmp_path):
    class Watches(Callback):
        def __init__(self):
            self.losses, self.says = [], print

        def after_batch(self):
            self.losses.append(self.learn.loss.detach())
            self.last, self.net = self.learn.pred, self.learn.model

    fit_plan(make(), PLAN, checkpoint=tmp_path, cbs=Watches())


def test_a_best_model_whose_file_is_gone_is_refused_before_the_first_batch(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        fit_plan(make(path=tmp_path), PLAN, checkpoint=tmp_path, cbs=[SaveModelCallback(), Interrupt(3)])
    (tmp_path / "models" / "model.pth").unlink()
    with pytest.raises(ValueError, match=r"ends the run with the best model, saved as .*model\.pth before"):
        fit_plan(make(path=tmp_path), PLAN, checkpoint=tmp_path, cbs=SaveModelCallback())


def test_ctrl_c_inside_mixup_gives_the_loss_back(tmp_path):
    learn = make()
    loss = learn.loss_func
    with pytest.raises(KeyboardInterrupt):
        fit_plan(learn, PLAN, checkpoint=tmp_path, cbs=[MixUp(), Interrupt(3)])
    assert learn.loss_func is loss
    fit_plan(learn, PLAN, checkpoint=tmp_path, cbs=MixUp())


# Values


def test_values_that_cannot_be_read_back_are_refused():
    endless = []
    endless.append((endless,))
    p = torch.zeros(4)
    odd = [
        object(),
        lambda: 0,
        {"a": [open]},
        np.array([object()]),
        [p[:2], p],
        [torch.zeros(2).to_sparse()],
        random.Random(),
    ]
    for value in odd:
        with pytest.raises(NotPlain):
            ValueWriter({}).write(value)
    node = ValueWriter({}).write(endless)
    again = ValueReader({}, torch.device("cpu")).read(node)
    assert again[0][0] is again


def test_digests_of_values_tell_them_apart():
    def of(value):
        return digest_of_node(ValueWriter({}).write(value))

    values = [0, 1, True, 1.0, "1", None, [], [1], (1,), {1}, {1: 2}, {2: 1}, [[], [1]], [[1], []], torch.ones(1)]
    values += [np.ones(1), np.float32(1), np.float64(1), torch.ones(1, 1), torch.ones(1, dtype=torch.float64), b"1", 1j]
    assert len({of(v) for v in values}) == len(values)
    assert of({"a", "b", "c", 4}) == of({4, "c", "b", "a"})
