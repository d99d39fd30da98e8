"""GroupRecorder: what it writes down is what the optimizer and the weights did."""

import copy
from functools import partial

import fastai.callback.schedule  # noqa: F401 (adds fit_one_cycle and lr_find)
import numpy as np
import pandas as pd
import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.training import GradientAccumulation, GradientClip
from fastai.learner import load_learner
from fastai.optimizer import SGD, OptimWrapper

from data import learner
from fasthaw.callbacks import FrozenEval, GroupRecorder, UnfreezeAt
from fasthaw.fit import lrs
from fasthaw.freezing import train_only
from fasthaw.rates import LayerDecay
from fasthaw.splitters import layer_groups, split_at
from networks import residual

NAMES = ["stem", "body.2", "head"]


def recording(*cbs, every=1, train="all", **kwargs):
    torch.manual_seed(0)
    learn = learner(
        residual(), splitter=split_at("body.2", "head"), cbs=[FrozenEval(), GroupRecorder(every), *cbs], **kwargs
    )
    train_only(layer_groups(learn), train)
    return learn


def table(learn, key):
    """`(steps, groups)`."""
    return learn.group_recorder.dataframe()[key].to_numpy().reshape(-1, 3)


class ByHand(Callback):
    """The same figures, taken one tensor at a time."""

    order = 91

    def before_fit(self):
        self.groups = layer_groups(self.learn)
        self.start = [[p.detach().clone() for p in g.params()] for g in self.groups]
        self.rows = []

    def before_step(self):
        self.grads = [norm([p.grad for p in g.params()]) for g in self.groups]
        self.before = [[p.detach().clone() for p in g.params()] for g in self.groups]

    def after_step(self):
        now = [[p.detach() for p in g.params()] for g in self.groups]
        updates = [norm(b - a for a, b in zip(*both, strict=True)) for both in zip(self.before, now, strict=True)]
        weights = [norm(ps) for ps in now]
        far = [norm(b - a for a, b in zip(*both, strict=True)) for both in zip(self.start, now, strict=True)]
        lr, mom = ([h[k] for h in self.learn.opt.hypers] for k in ("lr", "mom"))
        self.rows.append((lr, mom, self.grads, [u / w for u, w in zip(updates, weights, strict=True)], far))


def norm(tensors):
    return torch.cat([t.reshape(-1).double() for t in tensors]).norm().item()


def test_every_figure_is_what_a_loop_over_the_tensors_finds():
    learn = recording(ByHand())
    learn.fit_one_cycle(3, lrs(learn, LayerDecay(1e-2)))
    want = np.array(learn.by_hand.rows)
    assert want.shape == (6, 5, 3)
    for i, key in enumerate(["lr", "mom"]):
        assert (table(learn, key) == want[:, i]).all()
    for i, key in enumerate(["grad_norm", "update_ratio", "distance"], 2):
        np.testing.assert_allclose(table(learn, key), want[:, i], rtol=1e-4)


def test_the_rates_of_all_groups_are_kept_where_fastai_keeps_the_last():
    learn = recording()
    learn.fit_one_cycle(2, [1e-4, 1e-3, 1e-2])
    rates = table(learn, "lr")
    assert (rates[:, -1] == learn.recorder.lrs).all()
    np.testing.assert_allclose(rates[:, 0], rates[:, 2] / 100)


def test_norms_are_taken_every_so_many_steps():
    learn = recording(every=3)
    learn.fit_one_cycle(4, 1e-2)
    assert np.flatnonzero(np.isfinite(table(learn, "distance")[:, 0])).tolist() == [0, 3, 6]
    assert np.isfinite(table(learn, "lr")).all()


def test_a_frozen_group_has_a_rate_but_no_norms():
    learn = recording(train="head")
    learn.fit_one_cycle(1, 1e-2)
    assert table(learn, "frozen").tolist() == [[True, True, False]] * 2
    assert np.isnan(table(learn, "grad_norm")[:, :2]).all() and (table(learn, "grad_norm")[:, 2] > 0).all()
    assert (table(learn, "lr") > 0).all()


def test_unfreezing_inside_a_fit_is_recorded_from_its_epoch_on():
    learn = recording(UnfreezeAt({0: -1, 1: -2}))
    learn.fit_one_cycle(2, 1e-2)
    assert table(learn, "frozen")[:, 1].tolist() == [True, True, False, False]
    assert np.isfinite(table(learn, "update_ratio"))[:, 1].tolist() == [False, False, True, True]


def test_distance_is_from_the_weights_before_the_first_of_several_fits():
    learn = recording(opt_func=partial(SGD, mom=0.0))
    start = copy.deepcopy(learn.model).state_dict()
    for _ in range(2):
        learn.fit(1, 1e-2)
    far = norm(p.detach() - start[n] for n, p in learn.model.head.named_parameters(prefix="head"))
    assert table(learn, "distance")[-1, 2] == pytest.approx(far, rel=1e-4)
    assert learn.group_recorder.dataframe()["fit"].unique().tolist() == [0, 1]


def test_gradients_are_taken_as_the_optimizer_sees_them():
    learn = recording(GradientClip(1e-3))
    learn.fit(1, 1e-2)
    total = np.sqrt((table(learn, "grad_norm") ** 2).sum(1))
    np.testing.assert_allclose(total, 1e-3, rtol=1e-3)


def test_batches_that_only_accumulate_have_rates_and_no_norms():
    learn = recording(GradientAccumulation(16))
    learn.fit(2, 1e-2)
    assert np.isfinite(table(learn, "grad_norm")[:, 0]).tolist() == [False, True, False, True]
    assert len(table(learn, "lr")) == 4


def test_torch_optimizers_are_recorded():
    learn = recording(opt_func=partial(OptimWrapper, opt=torch.optim.AdamW))
    learn.fit_one_cycle(1, [1e-4, 1e-3, 1e-2])
    assert (table(learn, "lr")[:, 2] == learn.recorder.lrs).all()
    assert (table(learn, "mom")[0] == 0.95).all()


def test_predictions_and_lr_find_are_not_recorded():
    learn = recording()
    learn.fit(1, 1e-2)
    before = len(learn.group_recorder.dataframe())
    learn.validate()
    learn.get_preds()
    learn.lr_find(num_it=12, show_plot=False, suggest_funcs=None)
    assert len(learn.group_recorder.dataframe()) == before == 6


def test_recording_changes_nothing_in_the_run():
    def weights(*cbs):
        torch.manual_seed(0)
        learn = learner(residual(), splitter=split_at("body.2", "head"), cbs=cbs)
        learn.fit_one_cycle(2, 1e-2)
        return torch.cat([p.detach().reshape(-1) for p in learn.model.parameters()])

    assert torch.equal(weights(), weights(GroupRecorder(1)))


def test_the_record_is_written_as_csv(tmp_path):
    learn = recording()
    learn.fit_one_cycle(1, 1e-2)
    learn.group_recorder.to_csv(tmp_path / "groups.csv")
    read = pd.read_csv(tmp_path / "groups.csv")
    want = "fit epoch step group frozen lr mom grad_norm update_ratio distance"
    assert read.columns.tolist() == want.split()
    assert read["group"].tolist() == NAMES * 2
    np.testing.assert_allclose(read["lr"], learn.group_recorder.dataframe()["lr"])


def test_the_plot_has_a_panel_a_figure_and_lanes_grey_where_frozen():
    learn = recording(train="head")
    learn.fit_one_cycle(1, 1e-2)
    learn.unfreeze()
    learn.fit_one_cycle(1, 1e-2)
    fig = learn.group_recorder.plot_groups(["lr", "distance"])
    rate, distance, lanes = fig.axes
    assert [a.get_ylabel() for a in fig.axes] == ["learning rate", "distance from start", ""]
    assert [t.get_text() for t in rate.texts] == ["fit 1", "fit 2"]
    assert [len(line.get_xdata()) for line in rate.lines[:3]] == [2, 2, 4]  # stem and body from the second fit on
    assert len(distance.lines) == 5
    assert [t.get_text() for t in lanes.get_yticklabels()] == NAMES
    grey = [p for p in lanes.patches if p.get_facecolor() == (0.5, 0.5, 0.5, 0.25)]
    assert [(p.get_x(), p.get_width(), round(p.get_y())) for p in grey] == [(-0.5, 2, 0), (-0.5, 2, 1)]


@pytest.mark.parametrize("keys", [["loss"], []])
def test_an_unknown_figure_is_an_error(keys):
    learn = recording()
    learn.fit(1, 1e-2)
    with pytest.raises(ValueError, match="there is lr, mom, grad_norm, update_ratio, distance to plot"):
        learn.group_recorder.plot_groups(keys)


def test_nothing_recorded_is_nothing_to_plot():
    with pytest.raises(ValueError, match="nothing was recorded yet"):
        GroupRecorder().plot_groups()


@pytest.mark.parametrize("every", [0, -1, 2.5, True])
def test_every_is_a_whole_number_of_steps(every):
    with pytest.raises((TypeError, ValueError), match="every is how many steps apart"):
        GroupRecorder(every)


def test_one_recorder_does_not_mix_two_divisions_of_a_network():
    learn = recording()
    learn.fit(1, 1e-2)
    learn.splitter = split_at("head")
    learn.create_opt()
    with pytest.raises(ValueError, match=r"has recorded the groups stem, body\.2, head, and these are stem, head"):
        learn.fit(1, 1e-2)


def test_an_exported_learner_keeps_the_record_but_not_the_copy_of_the_weights(tmp_path):
    learn = recording()
    learn.path = tmp_path
    learn.fit(1, 1e-2)
    learn.export()
    again = load_learner(tmp_path / "export.pkl")
    assert again.group_recorder._start == {}
    assert again.group_recorder.dataframe().equals(learn.group_recorder.dataframe())
