"""Rates for a learner: right for the groups, or an error before anything is trained."""

import fastai.callback.schedule  # noqa: F401 (adds fit_one_cycle)
import pytest
import torch

from data import learner
from fasthaw import FrozenEval, Geometric, LayerDecay, PerGroup, layer_groups, lrs, split_at, split_stages, train_only
from networks import residual


def three_groups(**kwargs):
    torch.manual_seed(0)
    return learner(residual(), splitter=split_at("body.2", "head"), **kwargs)


@pytest.mark.parametrize(
    ("rate", "expected"),
    [
        (LayerDecay(1e-2, 0.1), [1e-4, 1e-3, 1e-2]),
        (slice(1e-4, 1e-2), [1e-4, 1e-3, 1e-2]),
        (slice(1e-2), [1e-3, 1e-3, 1e-2]),
        (1e-2, [1e-2, 1e-2, 1e-2]),
        ([0, 1e-3, 1e-2], [0.0, 1e-3, 1e-2]),
    ],
)
def test_one_float_a_group(rate, expected):
    rates = lrs(three_groups(), rate)
    assert rates == pytest.approx(expected) and all(type(r) is float for r in rates)


def test_the_optimizer_has_them_in_every_step():
    learn = three_groups(cbs=FrozenEval())
    learn.fit(1, lrs(learn, Geometric(1e-4, 1e-2)))
    assert [h["lr"] for h in learn.opt.hypers] == [1e-4, pytest.approx(1e-3), 1e-2]


def test_one_rate_serves_before_and_after_unfreezing():
    learn = three_groups(cbs=FrozenEval())
    before = lrs(learn, LayerDecay(1e-2))
    train_only(layer_groups(learn), "head")
    assert lrs(learn, LayerDecay(1e-2)) == before


def test_rates_for_fastais_own_groups():
    learn = learner(residual(), splitter=lambda m: [list(m.body.parameters()), list(m.head.parameters())])
    assert lrs(learn, slice(1e-3, 1e-2)) == [1e-3, 1e-2]


def test_parameters_frozen_by_hand_that_fastai_leaves_out_need_no_rate():
    net = residual()
    net.body.requires_grad_(False)
    learn = learner(net, splitter=lambda m: [[p for p in m.parameters() if p.requires_grad]], cbs=FrozenEval())
    before = [p.clone() for p in net.body.state_dict().values()]
    learn.fit(1, lrs(learn, 1e-2))
    assert all(torch.equal(a, b) for a, b in zip(before, net.body.state_dict().values(), strict=True))


def test_rates_that_fall_towards_the_head_are_said():
    with pytest.warns(UserWarning, match=r"fall towards the head: stem 0\.01, body\.2 0\.001, head 0\.0001"):
        lrs(three_groups(), Geometric(1e-2, 1e-4))


@pytest.mark.parametrize(
    ("rate", "error", "message"),
    [
        ([1e-3, 1e-2], ValueError, "PerGroup has 2 rates and there are 3 layer groups"),
        (PerGroup(1, 2, 3, 4), ValueError, "PerGroup has 4 rates and there are 3 layer groups"),
        (float("nan"), ValueError, "finite and not negative; got nan"),
        ([1e-3, -1e-3, 1e-2], ValueError, "rate 1 is finite and not negative; got -0.001"),
        (slice(0, 1e-2), ValueError, "lo is 0"),
        ("1e-3", TypeError, "a learning rate is a number"),
        (None, TypeError, "a learning rate is a number"),
        (0.0, ValueError, r"every group that trains \(stem, body\.2, head\) has the rate 0"),
    ],
)
def test_rates_are_refused(rate, error, message):
    with pytest.raises(error, match=message):
        lrs(three_groups(), rate)


def test_a_rate_for_frozen_groups_alone_is_refused():
    learn = three_groups()
    train_only(layer_groups(learn), "head")
    with pytest.raises(ValueError, match=r"every group that trains \(head\) has the rate 0"):
        lrs(learn, [1e-3, 1e-3, 0])


def test_an_optimizer_of_another_splitter_is_found():
    learn = three_groups()
    learn.create_opt()
    learn.splitter = split_stages()
    with pytest.raises(
        ValueError,
        match=r"3 parameter groups are not those that split_stages\(\) makes .*use_groups\(learn, split_stages\(\)\)",
    ):
        lrs(learn, 1e-3)
