"""Held statistics that describe what flows no longer: said once where a network collapses, and never where it does not."""

import warnings

import pytest
import torch
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders
from torch import nn

import networks
from data import Items, learner
from fasthaw import FreezeContract, FrozenEval, Plan, Stage, fit_plan, lr_find, split_at, split_stages
from fasthaw.freezing import distances, held_layers

HELD = FreezeContract(hold_stats="pretrained")
SAYS = "describe what flows through it no longer"


def loaders(bs=8, n=32):
    g = torch.Generator().manual_seed(0)
    items = [(torch.randn(3, 32, 32, generator=g), torch.tensor(i % 4)) for i in range(2 * n)]
    dls = DataLoaders.from_dsets(Items(items[:n]), Items(items[n:]), bs=bs, num_workers=0, device="cpu")
    dls.n_inp = 1
    return dls


def make(net=networks.plain, splitter=None, contract=HELD, **kwargs):
    """A learner whose statistics are those of its data."""
    torch.manual_seed(0)
    learn = learner(net(), splitter=splitter or split_at("head"), dls=loaders(**kwargs), cbs=FrozenEval(contract))
    with torch.no_grad():
        for _ in range(30):
            learn.model.train()(torch.stack([x for x, _ in learn.dls.train_ds]))
    return learn


@pytest.mark.parametrize("net", [networks.plain, networks.residual])
def test_a_collapse_is_said_in_its_first_epoch_and_once(net):
    learn = make(net, None if net is networks.plain else split_stages())
    with pytest.warns(UserWarning, match=SAYS) as said:
        learn.fit_one_cycle(1, 1.0)
    assert sum(SAYS in str(w.message) for w in said) == 1
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        learn.fit_one_cycle(3, 1.0)  # what began far away is the measure of this fit
    assert sum(SAYS in str(w.message) for w in said) <= 1


@pytest.mark.parametrize(
    ("contract", "train", "lr"),
    [
        (HELD, "all", 1e-3),
        (HELD, -1, 1.0),
        (FreezeContract(), "all", 1.0),
        (FreezeContract(hold_stats="nowhere"), "all", 1.0),
    ],
    ids=["small rates", "the head alone", "nothing is frozen", "statistics move"],
)
def test_nothing_is_said_where_statistics_hold_or_move(contract, train, lr):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit_plan(make(contract=contract), Plan(Stage(3, lr, train)))


def test_tiny_batches_of_vectors_say_nothing():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Sequential(nn.Flatten(), nn.Linear(3072, 8), nn.BatchNorm1d(8)), nn.Linear(8, 4))
    learn = learner(net, splitter=split_at("1"), dls=loaders(bs=4), cbs=FrozenEval(HELD))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        learn.fit_one_cycle(2, 1.0)


def test_a_sweep_of_rates_says_nothing():
    learn = make(n=200)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lr_find(learn, 1e-3, num_it=40, start_lr=1e-4)


def test_a_validation_says_nothing_and_leaves_no_hook():
    learn = make()
    learn.fit_one_cycle(1, 1e-3)
    for p in learn.model.body[0].parameters():
        p.data.mul_(100)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        learn.validate()
    assert not any(m._forward_pre_hooks for m in learn.model.modules())


class Stop(Callback):
    def after_pred(self):
        raise KeyboardInterrupt


def test_an_interruption_leaves_no_hook():
    learn = make()
    with pytest.raises(KeyboardInterrupt):
        learn.fit_one_cycle(1, 1e-3, cbs=Stop())
    assert not any(m._forward_pre_hooks for m in learn.model.modules())


def test_the_distance_is_that_of_the_first_call_of_held_layers():
    norm, moving, bare = (
        nn.BatchNorm2d(3).eval(),
        nn.BatchNorm2d(3),
        nn.BatchNorm2d(3, track_running_stats=False).eval(),
    )
    assert held_layers([norm, moving, bare, nn.LayerNorm(3).eval()]) == [norm]
    x = torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with distances([norm]) as seen:
        norm(x + 2)
        norm(x)
    assert seen[norm] == pytest.approx(2, abs=0.1)
