"""Many heads at once: each is what it would have become alone."""

import random

import pytest
import torch
from fastai.data.core import DataLoaders
from fastai.metrics import accuracy
from fastai.optimizer import SGD, Adam, Lamb, Lookahead, RMSProp
from torch import nn

from data import Items, learner
from fasthaw import FrozenEval, Plan, Stage, fit_plan, fused_adam, split_at, sweep_heads


def loaders(n=40, bs=8):
    g = torch.Generator().manual_seed(0)
    items = [(torch.randn(12, generator=g) + i % 3, torch.tensor(i % 3)) for i in range(n + 24)]
    return DataLoaders.from_dsets(Items(items[:n]), Items(items[n:]), bs=bs, num_workers=0, device="cpu")


def body():
    return nn.Sequential(nn.Linear(12, 8), nn.BatchNorm1d(8), nn.ReLU())


MORE = "norms and a hidden layer"
HEADS = {
    "linear": lambda: nn.Linear(8, 3),
    MORE: lambda: nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3)),
}


def make(head=HEADS["linear"], seed=0, **kwargs):
    torch.manual_seed(seed), random.seed(seed)
    net = nn.Sequential(body(), head())
    kwargs = {"metrics": [accuracy], "cbs": FrozenEval(), "dls": loaders()} | kwargs
    return learner(net, splitter=split_at("1"), seed=seed, **kwargs)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("head", "opt_func"), [("linear", Adam), ("linear", SGD), (MORE, Adam), (MORE, RMSProp), (MORE, fused_adam)]
)
def test_each_head_is_the_head_trained_alone(head, opt_func):
    head = HEADS[head]
    found = sweep_heads(make(head, opt_func=opt_func), [1e-3, 1e-1], wd=[0.0, 0.1], epochs=3)
    assert len(found.rows) == 4
    for row, weights in zip(found.rows, found.weights, strict=True):
        alone = make(head, opt_func=opt_func, wd=row.setting.wd)
        fit_plan(alone, Plan(Stage(3, row.setting.lr, train=-1, cache=True)))
        for name, t in alone.model[1].state_dict().items():
            torch.testing.assert_close(weights[name], t, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(row.values, tuple(alone.validate()), rtol=1e-5, atol=1e-5)


def test_masks_of_a_head_depend_on_nothing_but_the_seed():
    def dropping():
        return nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Dropout(0.3), nn.Linear(6, 3))

    many = sweep_heads(make(dropping), [1e-2, 1e-1], dropout=[0.0, 0.5], epochs=2)
    one = sweep_heads(make(dropping), 1e-1, dropout=0.5, epochs=2)
    other = sweep_heads(make(dropping), 1e-1, dropout=0.5, epochs=2, seed=1)
    assert many.rows[3].setting == one.rows[0].setting
    for name, t in one.weights[0].items():
        torch.testing.assert_close(many.weights[3][name], t, rtol=1e-5, atol=1e-5)
        assert not torch.equal(other.weights[0][name], t)


def test_dropout_that_is_not_asked_for_is_what_the_head_has():
    def dropping(p):
        return lambda: nn.Sequential(nn.Dropout(p), nn.Linear(8, 3))

    own = sweep_heads(make(dropping(0.5)), 1e-2, epochs=1)
    asked = sweep_heads(make(dropping(0.1)), 1e-2, dropout=0.5, epochs=1)
    none = sweep_heads(make(dropping(0.5)), 1e-2, dropout=0, epochs=1)
    assert torch.equal(own.weights[0]["1.weight"], asked.weights[0]["1.weight"])
    assert not torch.equal(own.weights[0]["1.weight"], none.weights[0]["1.weight"])


def test_the_learner_stays_as_it_was_and_can_take_the_best_head():
    learn = make()
    before = {k: t.clone() for k, t in learn.model.state_dict().items()}
    cbs, random_state = list(learn.cbs), torch.get_rng_state()
    found = sweep_heads(learn, [1e-4, 1e-1], epochs=2)
    assert all(torch.equal(t, before[k]) for k, t in learn.model.state_dict().items())
    assert list(learn.cbs) == cbs and torch.equal(torch.get_rng_state(), random_state)
    assert all(p.requires_grad for p in learn.model.parameters())
    assert found.best.setting.lr == 1e-1 and found.stage == Stage(2, 1e-1, train=-1, cache="auto")
    found.use(learn)
    torch.testing.assert_close(tuple(learn.validate()), found.best.values)


def test_the_sweep_prints_plots_and_is_a_frame():
    found = sweep_heads(make(), [1e-3, 1e-2], wd=[0, 0.1], epochs=1)
    assert "4 heads of 1 epochs; best by validation loss: lr" in str(found) and "<table" in found._repr_html_()
    assert found.dataframe()["wd"].tolist() == [0.0, 0.1, 0.0, 0.1] and found.plot().axes


class TwoCalls(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = body(), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.body(x)) + self.head(self.body(-x))


class Scaled(TwoCalls):
    def forward(self, x):
        return 2 * self.head(self.body(x))


@pytest.mark.parametrize(("net", "says"), [(TwoCalls, "2 times"), (Scaled, "something comes after it")])
def test_a_head_that_does_not_make_the_output_alone_is_refused(net, says):
    learn = learner(net(), splitter=split_at("head"), dls=loaders(), metrics=[accuracy])
    before = learn.model.head.weight.clone()
    with pytest.raises(ValueError, match=says):
        sweep_heads(learn, 1e-2, epochs=1)
    assert torch.equal(learn.model.head.weight, before)


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"rates": []}, ValueError, "none came"),
        ({"rates": [0.0]}, ValueError, "above 0"),
        ({"rates": ["1"]}, TypeError, "finite number"),
        ({"rates": [1e-2], "dropout": 1.0}, ValueError, r"p in \[0, 1\)"),
        ({"rates": [1e-2], "epochs": 0}, ValueError, "epochs"),
        ({"rates": [1e-2], "wd": [-1]}, ValueError, "weight decays"),
    ],
)
def test_bad_settings_are_refused(change, error, says):
    with pytest.raises(error, match=says):
        sweep_heads(make(), **change)


def test_an_optimizer_that_is_not_linear_in_its_rate_is_refused():
    with pytest.raises(ValueError, match="proportion"):
        sweep_heads(make(opt_func=lambda *args, **kwargs: Lookahead(Adam(*args, **kwargs))), 1e-2)
    with pytest.raises(ValueError, match="proportion"):
        sweep_heads(make(opt_func=Lamb), 1e-2)


def test_a_head_of_several_modules_is_refused_by_their_names():
    torch.manual_seed(0)
    net = nn.Sequential(body(), nn.LayerNorm(8), nn.Linear(8, 3))
    learn = learner(net, splitter=split_at("1"), dls=loaders())
    with pytest.raises(ValueError, match=r"1\.weight, 1\.bias, 2\.weight"):
        sweep_heads(learn, 1e-2)
