"""The fast forward of what is frozen: outputs to rounding, the network to the bit, and what cannot be served runs as ever."""

import copy
import pickle
import random
import warnings

import pytest
import torch
import torch.nn.functional as F
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders
from torch import nn

from data import Items, learner
from fasthaw import (
    FreezeContract,
    FreezeProof,
    FrozenEval,
    Plan,
    Stage,
    cached_features,
    fit_plan,
    train_only,
)
from fasthaw.splitters import split_at
from networks import Classifier, densenet, efficientnet_lite, residual, squeeze_excitation, vit

FAST = {"layout": "channels_last", "fold": True}


class Seen(Callback):
    """What the network returned, its gradients, and how many of its modules were answered for."""

    order = 20

    def before_fit(self):
        self.preds, self.grads, self.served = [], [], []

    def after_pred(self):
        self.preds.append(self.learn.pred.detach().clone())
        self.served.append(sum("forward" in vars(m) for m in self.learn.model.modules()))

    def before_step(self):
        self.grads += [p.grad.flatten() for p in self.learn.model.parameters() if p.grad is not None]


def fitted(make, splitter, which=-1, epochs=2, contract=None, **fast):
    torch.manual_seed(0)
    random.seed(0)
    cbs = [FrozenEval(contract or FreezeContract(), **fast), FreezeProof(), Seen()]
    learn = learner(make(), splitter=splitter, cbs=cbs)
    for m in learn.model.modules():
        if hasattr(m, "p"):
            m.p = 0.0  # a mask that is laid out otherwise is another mask
    with torch.no_grad():
        for m in learn.model.modules():
            if isinstance(m, nn.BatchNorm2d):  # as after training: not zero and one
                m.running_mean.normal_(0, 0.1), m.running_var.uniform_(0.5, 2)
                if m.affine:
                    m.weight.uniform_(0.5, 1.5), m.bias.normal_(0, 0.1)
    train_only(learn, which)
    learn.fit(epochs, 1e-3)
    return learn


def close(a, b, bound):
    return (a - b).abs().max() <= bound * b.abs().max().clamp(min=1e-12)


class Twice(nn.Module):
    """Two images through one body, as in a siamese network."""

    def __init__(self):
        super().__init__()
        self.body, self.head = residual().body, nn.Linear(16, 4)

    def forward(self, x):
        return self.head(torch.cat([self.body(x).mean((2, 3)), self.body(x.flip(3)).mean((2, 3))], 1))


class Functional(nn.Module):
    """BatchNorm as a function, a convolution in one dimension, and images without a batch."""

    def __init__(self):
        super().__init__()
        self.body = nn.ModuleDict({"a": nn.Conv2d(3, 8, 3, 2), "b": nn.Conv1d(8, 8, 3), "n": nn.BatchNorm1d(8)})
        self.register_buffer("mean", torch.zeros(8)), self.register_buffer("var", torch.ones(8))
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = torch.stack([self.body["a"](one) for one in x])
        x = F.batch_norm(x, self.mean, self.var)
        return self.head(self.body["n"](self.body["b"](x.flatten(2))).mean(2))


class Tied(nn.Module):
    """Two convolutions with one weight, each with a BatchNorm of its own."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2)
        self.body = nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8))
        self.body[2].weight = self.body[0].weight
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.body(self.stem(x)).mean((2, 3)))


def nested():
    net = residual()
    return nn.Sequential(net.body, nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)))


SERVED = {
    "residual": (residual, split_at("head")),
    "Sequential(body, head)": (nested, split_at("1")),
    "gates": (squeeze_excitation, split_at("head")),
    "padding of its own": (efficientnet_lite, split_at("_dropout")),
    "norm before convolution": (densenet, split_at("classifier")),
    "no convolution to speak of": (vit, split_at("heads")),
    "called twice": (Twice, split_at("head")),
    "functional norm, other dimensions": (Functional, split_at("head")),
    "tied": (Tied, split_at("head")),
}


@pytest.mark.parametrize("net", SERVED)
def test_outputs_and_gradients_are_those_of_the_network_to_rounding(net):
    plain, fast = fitted(*SERVED[net]), fitted(*SERVED[net], **FAST)
    assert set(plain.seen.served) == {0} and min(fast.seen.served) > 0
    assert all(close(a, b, 1e-5) for a, b in zip(fast.seen.preds, plain.seen.preds, strict=True))
    assert close(torch.cat(fast.seen.grads), torch.cat(plain.seen.grads), 1e-4)
    assert fast.freeze_proof.report().holds


def test_layout_and_folding_are_chosen_apart():
    for fast in ({"fold": True}, {"layout": "channels_last"}):
        plain, served = fitted(*SERVED["residual"]), fitted(*SERVED["residual"], **fast)
        assert min(served.seen.served) > 0
        assert all(close(a, b, 1e-5) for a, b in zip(served.seen.preds, plain.seen.preds, strict=True))


def test_it_is_off_by_default_and_told_by_the_callback():
    assert fitted(*SERVED["residual"]).seen.served == [0] * 8
    assert "fold" not in repr(FrozenEval())
    assert repr(FrozenEval(**FAST)).endswith(', layout="channels_last", fold=True)')
    with pytest.raises(ValueError, match="layout is one of 'channels_last'"):
        FrozenEval(layout="channels first")
    with pytest.raises(TypeError, match="fold is True or False"):
        FrozenEval(fold=1)


def test_a_frozen_part_behind_a_trained_one_passes_gradients_on():
    splitter = split_at("body.2", "head")
    plain, fast = (fitted(residual, splitter, "stem", **f) for f in ({}, FAST))
    assert min(fast.seen.served) > 0
    assert close(torch.cat(fast.seen.grads), torch.cat(plain.seen.grads), 1e-4)


def test_statistics_that_move_are_never_folded_in_training():
    contract = FreezeContract(hold_stats="nowhere")
    plain, fast = (fitted(residual, split_at("head"), contract=contract, **f) for f in ({}, {"fold": True}))
    for n, b in plain.model.named_buffers():
        assert torch.equal(b, fast.model.get_buffer(n))
    assert torch.equal(plain.seen.preds[0], fast.seen.preds[0])  # training
    assert close(fast.seen.preds[3], plain.seen.preds[3], 1e-5)  # validation


def exact(learn, x):
    with torch.no_grad():
        return copy.deepcopy(learn.model).eval()(x)


CHANGES = {
    "a weight through .data": lambda net: net.body[0].weight.data.mul_(-1),
    "a weight in place": lambda net: nn.init.normal_(net.body[2].conv1.weight),
    "a buffer": lambda net: net.body[2].bn1.running_mean.add_(1),
    "load_state_dict": lambda net: net.load_state_dict(
        {k: v * 1.5 if v.is_floating_point() else v for k, v in net.state_dict().items()}
    ),
    "a new parameter": lambda net: setattr(
        net.body[0], "weight", nn.Parameter(torch.randn(8, 3, 3, 3), requires_grad=False)
    ),
    "double precision": lambda net: net.double(),
    "settings": lambda net: (
        setattr(net.body[2].conv1, "padding_mode", "reflect") or setattr(net.body[2].bn2, "eps", 0.1)
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_copies_are_made_anew_when_what_is_frozen_changes(change):
    learn = fitted(*SERVED["residual"], **FAST)
    with torch.no_grad():
        CHANGES[change](learn.model)
    if change == "double precision":
        learn.dls = DataLoaders.from_dsets(
            *[Items((x.double(), y) for x, y in dl.dataset) for dl in learn.dls.loaders], bs=8, device="cpu"
        )
        learn.dls.n_inp = 1
    x = torch.stack([x for x, _ in learn.dls.valid.dataset])
    preds, _ = learn.get_preds(act=lambda t: t)
    assert close(preds, exact(learn, x), 1e-5) and min(learn.seen.served) > 0


def test_a_write_inside_an_epoch_is_seen_by_the_next_batch():
    class Writes(Callback):
        def after_batch(self):
            if self.training:
                with torch.no_grad():
                    self.learn.model.body[0].weight.add_(0.1)

    def run(**fast):
        torch.manual_seed(0)
        random.seed(0)
        learn = learner(residual(), splitter=split_at("head"), cbs=[FrozenEval(**fast), Seen(), Writes()])
        train_only(learn, -1)
        learn.model.head[0].p = 0.0
        learn.fit(1, 1e-3)
        return learn.seen.preds

    assert all(close(a, b, 1e-5) for a, b in zip(run(**FAST), run(), strict=True))


def test_what_is_unfrozen_is_served_no_more():
    learn = fitted(*SERVED["residual"], **FAST)
    served = learn.seen.served[0]
    train_only(learn, "all")
    learn.fit(1, 1e-3)
    assert learn.seen.served[0] == 0 < served
    learn = fitted(residual, split_at("body.2", "head"), **FAST)
    more, _ = learn.seen.served[0], train_only(learn, -2)
    learn.fit(1, 1e-3)
    assert 0 < learn.seen.served[0] < more
    learn.remove_cbs([FrozenEval, FreezeProof])
    learn.fit(1, 1e-3)
    assert set(learn.seen.served) == {0}


def test_validation_and_prediction_are_served_and_nothing_is_left():
    learn = fitted(*SERVED["residual"], **FAST)
    x = learn.dls.valid.dataset[3][0]
    learn.seen.served.clear()
    loss = learn.validate()[0]
    assert min(learn.seen.served) > 0
    other = learner(copy.deepcopy(learn.model), splitter=split_at("head"))
    assert loss == pytest.approx(other.validate()[0], rel=1e-5)
    assert close(learn.get_preds(act=lambda t: t)[0][3], exact(learn, x[None])[0], 1e-5)
    assert not any("forward" in vars(m) for m in learn.model.modules())


def test_copies_exports_and_interrupted_fits_leave_nothing(tmp_path):
    class Stops(Callback):
        def after_batch(self):
            self.copied = copy.deepcopy(self.learn.model), pickle.loads(pickle.dumps(self.learn.model))
            raise KeyboardInterrupt

    torch.manual_seed(0)
    learn = learner(residual(), splitter=split_at("head"), cbs=[FrozenEval(**FAST)], path=tmp_path)
    train_only(learn, -1)
    stops = Stops()
    with pytest.raises(KeyboardInterrupt):
        learn.fit(1, 1e-3, cbs=stops)
    assert not any("forward" in vars(m) for m in learn.model.modules())
    x = torch.randn(2, 3, 32, 32)
    for one in stops.copied:
        with torch.no_grad():
            nn.init.normal_(one.body[0].weight)
            own, plain = one.eval()(x), residual()
            plain.load_state_dict(one.state_dict())
            assert torch.equal(own, plain.eval()(x))
    learn.export("x.pkl")
    found = torch.load(tmp_path / "x.pkl", weights_only=False)
    assert not any("forward" in vars(m) for m in found.model.modules()) and found.frozen_eval.fast.fold


class View(nn.Module):
    """Flattens by `view`, which needs channels first."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8)), nn.Linear(8, 4)

    def forward(self, x):
        x = self.body(x)
        n, c, h, w = x.shape
        return self.head(x.view(n, c * h * w).reshape(n, c, h * w).mean(2))


class Reads(nn.Module):
    """Reads what a convolution returns past its BatchNorm."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8))
        self.conv, self.bn, self.head = nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 4)

    def forward(self, x):
        x = self.conv(self.stem(x))
        return self.head((self.bn(x) + x).mean((2, 3)))


class Standardised(nn.Conv2d):
    """Standardises its weight in the forward: a scale folded into it has no effect."""

    def forward(self, x):
        w = self.weight
        return F.conv2d(
            x, (w - w.mean((1, 2, 3), keepdim=True)) / w.std((1, 2, 3), keepdim=True), self.bias, self.stride
        )


def standardised():
    return Classifier(
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), Standardised(8, 8, 3, 2), nn.BatchNorm2d(8)), 8
    )


@pytest.mark.parametrize(
    ("make", "why", "served"),
    [
        (View, r"with channels last it does not run \(view size is not compatible", 2),
        (Reads, r"with conv folded its outputs differ", 3),
        (standardised, r"with body.2 folded its outputs differ", 3),
    ],
)
def test_what_cannot_be_served_runs_as_ever_and_the_rest_is_served(make, why, served):
    with pytest.warns(UserWarning, match=why) as told:
        fast = fitted(make, split_at("head"), **FAST)
    assert len([w for w in told if "folding or channels last" in str(w.message)]) == 1  # not in every epoch
    assert set(fast.seen.served) == {served}
    plain = fitted(make, split_at("head"))
    assert all(close(a, b, 1e-5) for a, b in zip(fast.seen.preds, plain.seen.preds, strict=True))


def test_a_compiled_network_is_left_alone():
    torch.manual_seed(0)
    net = residual()
    net.compile(backend="eager")
    learn = learner(net, splitter=split_at("head"), cbs=[FrozenEval(**FAST), Seen()])
    train_only(learn, -1)
    with pytest.warns(UserWarning, match="it is compiled"):
        learn.fit(1, 1e-3)
    assert set(learn.seen.served) == {0}


def test_who_listens_to_a_layer_hears_that_layer():
    heard = {}
    for name, fast in {"plain": {}, "fast": FAST}.items():
        torch.manual_seed(0)
        random.seed(0)
        learn = learner(residual(), splitter=split_at("head"), cbs=[FrozenEval(**fast)])
        train_only(learn, -1)
        learn.model.body[0].register_forward_hook(
            lambda m, x, y, name=name: heard.setdefault(name, []).append(y.clone())
        )
        learn.validate()
    assert all(close(a, b, 1e-6) for a, b in zip(heard["fast"][-2:], heard["plain"][-2:], strict=True))


def test_a_network_that_takes_another_way_in_some_batches_is_stopped_before_the_step():
    class Sometimes(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn, self.head, self.calls = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 4), 0

        def forward(self, x):
            self.calls += self.training
            x = self.conv(x)
            return self.head((x if self.calls > 1 else self.bn(x)).mean((2, 3)))

    net = Sometimes()
    learn = learner(net, splitter=split_at("head"), cbs=[FrozenEval(**FAST)])
    train_only(learn, -1)
    with pytest.raises(RuntimeError, match="conv was folded with its BatchNorm, which this batch did not call"):
        learn.fit(1, 1e-3)
    assert learn.opt.state[net.head.weight]["step"] == 1
    assert not any("forward" in vars(m) for m in net.modules())


def test_within_a_cache_and_a_plan_it_stays_out_of_the_way():
    torch.manual_seed(0)
    random.seed(0)
    learn = learner(residual(), splitter=split_at("body.2", "head"), cbs=[FrozenEval(**FAST), Seen()])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit_plan(learn, Plan(Stage(1, 1e-3, -1, cache=True), Stage(1, 1e-3, -2), Stage(1, 1e-3)))
        train_only(learn, -1)
        with cached_features(learn):
            learn.fit(2, 1e-3)
    assert not any("forward" in vars(m) for m in learn.model.modules())
