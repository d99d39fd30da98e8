"""`param_groups` inside fastai's `OptimWrapper`: rates, plans and `freeze()` mean layer groups, what is spared stays so."""

import copy
import pickle
import random

import fastai.callback.schedule  # noqa: F401 (adds fit_one_cycle)
import pytest
import torch
from fastai.optimizer import OptimWrapper
from torch import nn

from data import learner
from fasthaw import (
    FreezeProof,
    FrozenEval,
    GroupRecorder,
    LayerDecay,
    Plan,
    Stage,
    UnfreezeAt,
    fit_plan,
    frozen,
    group_table,
    lr_find,
    lrs,
    param_groups,
    preview,
    split_at,
    train_only,
)
from fasthaw.callbacks import grouped
from networks import residual

SPLIT = split_at("body.3", "head")
WAYS = ("a function", "built before", "fused")


def made(way="a function", cbs=(), net=None, **kwargs):
    """A learner whose optimizer is made of `param_groups`: six of them, for three layer groups."""
    torch.manual_seed(0)
    random.seed(0)
    net = residual() if net is None else net

    def opt_func(params, lr):
        return OptimWrapper(param_groups(net, SPLIT, lr, weight_decay=0.3), opt=torch.optim.AdamW, fused=way == "fused")

    opt = OptimWrapper(opt=torch.optim.AdamW(param_groups(net, SPLIT, 1e-3, weight_decay=0.3)))
    return learner(net, splitter=SPLIT, opt_func=opt if way == "built before" else opt_func, cbs=list(cbs), **kwargs)


ways = pytest.mark.parametrize("way", WAYS)


@ways
def test_freeze_means_layer_groups(way):
    learn = made(way, [FrozenEval(), FreezeProof()])
    learn.freeze()
    assert frozen(learn) == (True, True, False) and all(p.requires_grad for p in learn.model.head.parameters())
    learn.fit(1, 1e-2)
    assert learn.freeze_proof.report().holds and learn.freeze_proof.report().proved == ("stem", "body.3")
    assert not any(p in learn.opt.opt.state for p in learn.model.body.parameters())
    learn.freeze_to(-2)
    assert frozen(learn) == (True, False, False)
    learn.freeze_to(1)
    assert frozen(learn) == (True, False, False)
    learn.unfreeze()
    assert frozen(learn) == (False, False, False)


@ways
def test_rates_are_one_a_layer_group_and_what_is_spared_does_not_decay(way):
    learn = made(way, [FrozenEval()])
    rates = lrs(learn, LayerDecay(1e-2, 0.1))
    learn.fit(1, rates, wd=0.5)
    groups = learn.opt.opt.param_groups
    assert [g["lr"] for g in groups] == [r for r in rates for _ in range(2)]
    assert [g["weight_decay"] for g in groups] == [0.5, 0.0] * 3
    assert [h["wd"] for h in learn.opt.hypers] == [0.5] * 3 and len(learn.opt.param_lists) == 3
    assert all(f" {rate:g} " in str(group_table(learn)) for rate in rates)
    before = {n: p.detach().clone() for n, p in learn.model.named_parameters()}
    for p in learn.model.parameters():
        p.grad = torch.zeros_like(p)
    learn.opt.opt.state.clear()
    learn.opt.step()
    still = {n for n, p in learn.model.named_parameters() if torch.equal(p, before[n])}
    assert still == {n for n, p in learn.model.named_parameters() if p.ndim == 1}


def test_a_fit_ends_in_the_weights_of_a_loop_with_the_same_param_groups():
    learn = made(cbs=[FrozenEval()])
    for m in learn.model.modules():
        if hasattr(m, "p"):
            m.p = 0.0  # no noise: fastai draws numbers besides
    other = copy.deepcopy(learn.model)
    learn.fit(2, lrs(learn, LayerDecay(1e-2, 0.1)))
    again = made(net=other)
    opt = torch.optim.AdamW(param_groups(other, SPLIT, LayerDecay(1e-2, 0.1), weight_decay=0.3))
    for _ in range(2):
        other.train()
        for x, y in again.dls.train:
            opt.zero_grad()
            again.loss_func(other(x), y).backward()
            opt.step()
    for a, b in zip(learn.model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@ways
def test_a_plan_runs_and_is_previewed_and_taken_up(way, tmp_path):
    plan = Plan(Stage(1, 1e-2, -1), Stage(1, slice(1e-4, 1e-2), -2), Stage(1, slice(1e-4, 1e-2)))
    learn = made(way, [GroupRecorder()])
    assert preview(learn, plan).rates.shape == (6, 3)
    record = fit_plan(learn, plan, checkpoint=tmp_path / "run.pt")
    assert [len(s.trained) for s in record.stages] == [1, 2, 3]
    assert set(learn.group_recorder.dataframe()["group"]) == {"stem", "body.3", "head"}
    again = made(way)
    fit_plan(again, plan, checkpoint=tmp_path / "run.pt")
    assert all(torch.equal(a, b) for a, b in zip(learn.model.parameters(), again.model.parameters(), strict=True))


def test_a_sweep_an_unfreezing_and_a_recorder_alone_read_it_by_layer_group():
    learn = made()
    learn.create_opt()
    assert len(lr_find(learn, slice(1e-4, 1e-2), num_it=20).highest) > 9
    learn = made(cbs=[UnfreezeAt({0: -1, 1: 0})])
    learn.fit(2, 1e-3)
    assert len(learn.opt.param_lists) == 3
    learn = made(cbs=[GroupRecorder()])
    learn.fit(1, 1e-3)
    assert len(learn.opt.param_lists) == 3


@pytest.mark.parametrize(
    ("freeze", "states"),
    [
        (lambda learn: learn.freeze(), (True, True, False)),
        (lambda learn: learn.freeze_to(-2), (True, False, False)),
        (lambda learn: learn.freeze_to(1), (True, False, False)),
        (lambda learn: learn.freeze_to(2), (True, True, False)),
        (lambda learn: (learn.freeze(), train_only(learn, "body.3")), (True, False, True)),
        (lambda learn: learn.unfreeze(), (False, False, False)),
    ],
)
def test_what_was_frozen_before_anything_of_ours_looked_is_meant_of_layer_groups(freeze, states):
    learn = made()
    freeze(learn)
    learn.add_cb(FrozenEval())
    learn.fit(1, 1e-3)
    assert frozen(learn) == states


def test_a_number_that_can_mean_two_things_is_refused():
    learn = made()
    learn.freeze_to(3)
    before = copy.deepcopy(learn.model.state_dict())
    with pytest.raises(
        ValueError, match="first 3 of the optimizer's 6 param groups frozen, and they are 3 layer groups"
    ):
        learn.fit(1, 1e-3, cbs=FrozenEval())
    assert all(torch.equal(t, before[n]) for n, t in learn.model.state_dict().items())


def test_saved_state_is_read_again(tmp_path):
    learn = made(cbs=[FrozenEval()], path=tmp_path)
    learn.fit(1, 1e-3)
    learn.save("x", with_opt=True)
    again = made(cbs=[FrozenEval()], path=tmp_path)
    again.load("x", with_opt=True)
    one, other = (
        {n: learn.opt.opt.state[p]["exp_avg"] for n, p in learn.model.named_parameters()} for learn in (learn, again)
    )
    assert all(torch.equal(one[n], other[n]) for n in one)


def test_a_copied_optimizer_is_read_by_layer_group():
    learn = made(cbs=[FrozenEval()])
    learn.create_opt()
    assert [len(ps) for ps in copy.deepcopy(learn.opt).param_lists] == [len(ps) for ps in learn.opt.param_lists]
    assert len(pickle.loads(pickle.dumps(learn.opt)).hypers) == 3


def test_other_optimizers_are_left_as_they_are():
    net = residual()
    plain = learner(net, splitter=SPLIT, opt_func=lambda ps, lr: OptimWrapper(ps, opt=torch.optim.SGD, lr=lr))
    named = [{"params": list(p), "group_name": "one"} for p in (net.body.parameters(), net.head.parameters())]
    named.insert(1, {"params": [nn.Parameter(torch.ones(1))], "group_name": "two"})
    apart = learner(net, splitter=SPLIT, opt_func=OptimWrapper(opt=torch.optim.SGD(named, 0.1)))
    for learn in (plain, apart):
        learn.create_opt()
        opt = learn.opt
        grouped(learn)
        assert learn.opt is opt and type(opt) is OptimWrapper


def test_a_removed_callback_leaves_nothing_on_the_learner():
    learn = made()
    before = set(vars(learn))
    learn.add_cb(FrozenEval())
    learn.remove_cb(FrozenEval)
    assert set(vars(learn)) == before
