"""The house recipe: what it plans for which network, what moves, what follows the batches, and what it refuses."""

import pytest
import torch
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders
from fastai.losses import MSELossFlat
from torch import nn

import networks
from data import Items, learner, loaders
from fasthaw import FreezeContract, Plan, Stage, fine_tune, fine_tune_plan, split_at, split_stages

MOVING, HELD = FreezeContract(hold_stats="nowhere"), FreezeContract(hold_stats="pretrained")


def make(net=networks.plain, splitter=None, **kwargs):
    torch.manual_seed(0)
    return learner(net(), splitter=splitter or split_at("head"), **kwargs)


def test_a_body_with_batchnorm_trains_at_one_large_rate_on_the_statistics_of_its_batches():
    head, everything = fine_tune_plan(make(), 5)
    assert head == Stage(1, 6.25e-4, -1, "head", MOVING)
    assert (everything.epochs, everything.train, everything.contract) == (3, "all", MOVING)
    assert everything.lr(2) == pytest.approx((0.07 / (6**0.5 * 2**0.25),) * 2)  # 3 epochs of 2 batches, 2 layers


def test_another_body_has_small_rates_and_its_first_group_stays_frozen():
    learn = make(networks.vit, split_stages())
    n = len(learn.splitter.groups(learn.model))
    head, everything = fine_tune_plan(learn, 5)
    assert head == Stage(1, 1e-2, -1, "head", HELD)
    small = 0.0004 / 6**0.5
    assert (everything.epochs, everything.train, everything.contract) == (3, -(n - 1), HELD)
    assert everything.lr(3) == pytest.approx((small, small, 20 * small))
    two = make(networks.vit, split_at("heads"))
    assert fine_tune_plan(two, 5).stages[1].train == "all"


def test_more_steps_have_smaller_rates():
    one, more = (fine_tune_plan(make(), n).stages[1] for n in (2, 12))
    assert (one.epochs, more.epochs) == (1, 7)
    assert one.lr.lr / more.lr.lr == pytest.approx(7**0.5)


def test_given_rates_are_taken():
    head, everything = fine_tune_plan(make(), 5, 3e-2, body_lr=1e-3)
    assert (head.lr.lr, everything.lr.lr) == (3e-2, 1e-3)
    *_, everything = fine_tune_plan(make(networks.vit, split_stages()), 5, body_lr=1e-4)
    assert everything.lr(3) == pytest.approx((1e-4, 1e-4, 2e-3))


@pytest.mark.parametrize(
    ("bs", "asked", "held"), [(8, None, False), (7, None, True), (8, True, True), (4, False, False)]
)
def test_statistics_are_held_where_batches_are_small_or_it_is_asked(bs, asked, held):
    learn = make(dls=loaders(bs=bs))
    before = learn.model.body[1].running_mean.clone()
    assert fine_tune_plan(learn, 3, hold_stats=asked).stages[1].contract == (HELD if held else MOVING)
    fine_tune(learn, 3, hold_stats=asked)
    assert torch.equal(learn.model.body[1].running_mean, before) == held


def far_away(n=32):
    g = torch.Generator().manual_seed(0)
    items = [(torch.randn(3, 32, 32, generator=g) * 3 + 5, torch.tensor(i % 4)) for i in range(n)]
    return DataLoaders.from_dsets(Items(items), Items(items[:8]), bs=8, num_workers=0, device="cpu")


def test_running_statistics_follow_within_an_epoch_whatever_their_momentum_was():
    def drift(train):
        learn = make(dls=far_away())
        norm = learn.model.body[1]
        norm.momentum = 0.001
        train(learn)
        with torch.no_grad():
            x = torch.stack([x for x, _ in far_away().train_ds])
            flowing = learn.model.eval().body[0](x).mean((0, 2, 3))
        assert norm.momentum == 0.001
        return (norm.running_mean - flowing).abs().max()

    assert drift(lambda learn: fine_tune(learn, 4)) < 0.2 * drift(lambda learn: learn.fine_tune(1))


class Stop(Callback):
    def after_batch(self):
        raise KeyboardInterrupt


def test_momentum_is_put_back_after_an_interruption():
    learn = make()
    with pytest.raises(KeyboardInterrupt):
        fine_tune(learn, 2, cbs=Stop())
    assert [m.momentum for m in learn.model.modules() if isinstance(m, nn.BatchNorm2d)] == [0.1, 0.1]


def test_a_momentum_of_none_is_left_alone():
    learn = make()
    learn.model.body[1].momentum = None
    fine_tune(learn, 1)
    assert learn.model.body[1].momentum is None


def test_the_record_says_that_the_head_trained_alone_first():
    record = fine_tune(make(), 2)
    assert [s.trained for s in record.stages] == [("head",), ("stem", "head")]
    assert [s.epochs for s in record.stages] == [1, 1]


def test_an_unusual_rate_of_the_head_changes_the_head_alone():
    plans = [fine_tune_plan(make(), 5, lr) for lr in (None, 2.5e-3, 4e-2)]
    assert len({plan.stages[1] for plan in plans}) == 1


def test_the_record_tells_how_far_the_statistics_of_the_data_are():
    near, far = make(dls=loaders(bs=8)), make(dls=far_away())
    near.model.train()(torch.stack([x for x, _ in near.dls.train_ds]))
    with torch.no_grad():
        for _ in range(30):
            near.model(torch.stack([x for x, _ in near.dls.train_ds]))
    assert "were 0." in fine_tune(near, 1).note and "follow the batches" in fine_tune(far, 1).note
    with pytest.warns(UserWarning, match="another sensor"):
        fine_tune(make(dls=far_away()), 1, hold_stats=True)
    assert not fine_tune(make(networks.vit, split_stages()), 1).note


def test_no_hook_is_left():
    learn = make()
    with pytest.raises(KeyboardInterrupt):
        fine_tune(learn, 2, cbs=Stop())
    fine_tune(learn, 1)
    assert not any(m._forward_pre_hooks for m in learn.model.modules())


def test_a_head_that_trains_for_long_is_cached():
    head, _ = fine_tune_plan(make(networks.vit, split_stages()), 12)
    assert (head.epochs, head.cache) == (3, "auto")
    assert fine_tune_plan(make(networks.vit, split_stages()), 11).stages[0].cache is False


def numbers():
    g = torch.Generator().manual_seed(0)
    items = [(x := torch.randn(3, 32, 32, generator=g), x.mean((1, 2)).repeat(2)[:4]) for _ in range(32)]
    return DataLoaders.from_dsets(Items(items[:16]), Items(items[16:]), bs=8, num_workers=0, device="cpu")


def test_regression_trains():
    torch.manual_seed(0)
    learn = make(dls=numbers())
    learn.loss_func = MSELossFlat()
    before = learn.validate()[0]
    fine_tune(learn, 6)
    assert learn.validate()[0] < before


@pytest.mark.parametrize("net", [networks.densenet, networks.swin, networks.efficientnet_lite, networks.other_norms])
def test_every_group_that_should_train_does(net):
    learn = make(net, split_stages())
    trained = fine_tune(learn, 3).stages[1].trained
    names = [g.name for g in learn.splitter.groups(learn.model)]
    assert list(trained) in (names, names[1:])


@pytest.mark.parametrize(
    ("args", "error", "says"),
    [
        ((0,), ValueError, "epochs are what fine_tune trains"),
        ((1.5,), TypeError, "epochs"),
        ((1, 0), ValueError, "above 0"),
        ((1, -1.0), ValueError, "from 0 on"),
        ((1, "1e-3"), TypeError, "finite number"),
    ],
)
def test_bad_input_is_refused(args, error, says):
    with pytest.raises(error, match=says):
        fine_tune(make(), *args)


def test_a_learner_without_a_head_is_refused_with_the_way_out():
    learn = learner(networks.plain(), splitter=lambda model: [list(model.parameters())])
    with pytest.raises(ValueError, match="use_groups"):
        fine_tune(learn, 1)


def test_the_plan_prints_and_is_one():
    plan = fine_tune_plan(make(), 5)
    assert isinstance(plan, Plan) and "nowhere" in str(plan)
